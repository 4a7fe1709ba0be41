"""混合专家的前馈层：路由器挑 k 个专家，每个专家是一个小的前馈，结果按权重相加。

B 批、T 词元数、C 宽度、N = B·T、E 专家数、k 每个词元的专家数、h 一个专家的宽度。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPT2Config
from ..layers.context import Context, Load
from ..layers.fused import feed_forward_parts
from ..mlp import ACTIVATIONS, MLP
from ..visibility.positions import PADDING
from .balance import balance_loss, capacity, z_loss
from .dispatch import Way, choose_dispatch, count, drop_overflow, group
from .grouped import GroupedLinear
from .router import Choice, Router


class Experts(nn.Module):
    """E 个前馈叠在一起：c_fc (E, h, C)（有门的是 2h）、c_proj (E, C, h)。"""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.count, self.dispatch = config.moe_num_experts, config.moe.dispatch
        width, hidden = config.n_embed, config.expert_hidden
        rows = sum(feed_forward_parts(config, hidden).values())
        self.c_fc = GroupedLinear(self.count, width, rows, config.bias)
        self.c_proj = GroupedLinear(self.count, hidden, width, config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor, complete: bool = False) -> Tensor:
        """x (N, C)、expert (N, k)（E = 不归任何专家）、weight (N, k) -> (N, C)。

        complete：静态事实，每一对都归某个专家。
        """
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        widths = (x.shape[1], self.c_proj.weight.shape[2])
        way, _ = choose_dispatch(self.dispatch, x.device, dtype, widths)
        if way == "reference":
            return self.reference(x, expert, weight)
        groups = group(expert, self.count, complete)
        rows = x.index_select(0, groups.token)  # (R, C)
        rows = self.each(way, rows, groups.ends, groups.complete)
        # 取回按词元排的 (N, k, C) 再一次乘加；index_add 会把乘过权重的那一份也留给反向。
        back = rows.index_select(0, groups.row).view(*weight.shape, -1)
        return torch.bmm(weight[:, None].to(back.dtype), back).squeeze(1)

    def each(self, way: Way, rows: Tensor, ends: Tensor, complete: bool) -> Tensor:
        """(R, C) -> (R, C)，按专家排好的行各过自己的专家；ends 之后的行是零。"""
        grouped = way == "grouped"
        rows = self.activation(self.c_fc(rows, ends, grouped, complete))
        y: Tensor = self.c_proj(rows, ends, grouped, complete)
        return y

    def reference(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """每个专家算每个词元，再按权重相加：慢，但一眼看得出是对的。"""
        total = torch.zeros_like(x)
        for e in range(self.count):
            hidden = self.activation(F.linear(x, *self.c_fc.of(e)))
            y = F.linear(hidden, *self.c_proj.of(e))
            total = total + y * ((expert == e) * weight).sum(1, keepdim=True).to(y.dtype)
        return total


class MoE(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.capacity_factor = config.moe.capacity_factor
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = MLP(config, config.shared_hidden) if config.moe.shared_experts else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)。填充不进路由，结果里只有共享专家的部分。

        负载与路由写进 ctx.note。
        """
        B, T, C = x.shape
        flat = x.reshape(-1, C)
        choice = self.router(flat)
        real = _real(ctx, B)
        expert, experts = choice.expert, self.experts.count
        if real is not None:
            expert = expert.masked_fill(~real[:, None], experts)
        load = kept = count(expert, experts)
        # 容量只在训练时有：丢不丢取决于同批的别的词元，生成时那会破坏因果与成批的一致。
        factor = self.capacity_factor if self.training else None
        if factor is not None:
            limit = capacity(factor, real, B * T, self.router.top_k, experts)
            expert = drop_overflow(expert, experts, limit)
            kept = count(expert, experts)
        y = self.experts(flat, expert, choice.weight, complete=real is None and factor is None)
        if "load" in ctx.note.wishes:
            ctx.note.load = self.count_load(load, load.sum() - kept.sum(), choice, real)
        if "routing" in ctx.note.wishes:
            k = expert.shape[1]
            ctx.note.routing = expert.view(B, T, k), choice.weight.view(B, T, k)
        y = self.dropout(y).view(B, T, C)
        return y if self.shared is None else y + self.shared(x)

    def count_load(
        self, load: Tensor, dropped: Tensor, choice: Choice, real: Tensor | None
    ) -> Load:
        """真词元 real (N,) 的负载与两种损失。一行只在这里的一段时（上下文并行）换下的就是它。"""
        return Load(
            load, dropped, balance_loss(load, choice.share, real), z_loss(choice.logits, real)
        )


def _real(ctx: Context, rows: int) -> Tensor | None:
    """(N,) bool：不是填充的词元；None = 静态地知道没有填充。"""
    if ctx.positions.start is not None:
        return None
    pos = ctx.positions.pos
    return (pos != PADDING).expand(rows, -1).reshape(-1)

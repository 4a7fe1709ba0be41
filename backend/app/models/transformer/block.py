"""一层 = 两个子层（注意力、前馈），各套一次残差。四种归一化位置只是同一个式子的取值：

    x <- outer(α·x + branch(inner(x)))

| norm     | inner | outer | α          | 来源                                     |
|----------|-------|-------|------------|------------------------------------------|
| post     |       | 有    | 1          | Vaswani et al. 2017；GPT-1               |
| pre      | 有    |       | 1          | GPT-2（模型末尾另有一个归一化）          |
| deepnorm |       | 有    | (2N)^(1/4) | Wang et al. 2022, arXiv:2203.00555       |
| keel     | 有    | 有    | 2N         | arXiv:2601.19895；最初两个子层有例外     |

N 是层数（不是子层数）。B 批、T 词元数、C 宽度。
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Attention
from .config import GPT2Config
from .experts.moe import MoE
from .layers.context import Context
from .layers.norm import make_norm
from .mlp import MLP


@dataclass(frozen=True)
class Residual:
    """一个子层的残差：有没有 inner、outer，以及 α。"""

    inner: bool
    outer: bool
    alpha: float = 1.0

    def __call__(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        norm: nn.Module,
        post: nn.Module | None,
    ) -> Tensor:
        """x <- outer(α·x + branch(inner(x)))。norm 是唯一的归一化；两个都有时 post 是 outer。"""
        y = branch(norm(x) if self.inner else x)
        y = torch.add(y, x, alpha=self.alpha)
        if not self.outer:
            return y
        return norm(y) if post is None else post(y)


def residuals(config: GPT2Config, layer: int) -> tuple[Residual, Residual]:
    """第 layer 层（从 0 数）的 (注意力, 前馈) 两个残差。"""
    n = config.n_layer
    if config.norm == "pre":
        return (Residual(True, False),) * 2
    if config.norm == "post":
        return (Residual(False, True),) * 2
    if config.norm == "deepnorm":
        return (Residual(False, True, (2 * n) ** 0.25),) * 2
    if layer == 0:
        # KEEL 第 3 节：首个注意力没有 outer，首层两个子层 α = 1，否则嵌入会被 2N 倍放大。
        return Residual(True, False), Residual(True, True)
    return (Residual(True, True, 2.0 * n),) * 2


class Block(nn.Module):
    """ln_1/ln_2 是 GPT-2 的名字：子层唯一的归一化，或 keel 的 inner；*_post 是 keel 的 outer。"""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.residuals = first, second = residuals(config, layer)
        self.attn = Attention(config)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)
        self.ln_1 = make_norm(config)
        self.ln_1_post = make_norm(config) if first.inner and first.outer else None
        self.ln_2 = make_norm(config)
        self.ln_2_post = make_norm(config) if second.inner and second.outer else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)。"""
        around_attn, around_mlp = self.residuals
        x = around_attn(x, lambda h: self.attn(h, ctx), self.ln_1, self.ln_1_post)
        return around_mlp(x, lambda h: self.feed_forward(h, ctx), self.ln_2, self.ln_2_post)

    def feed_forward(self, x: Tensor, ctx: Context) -> Tensor:
        """路由要看填充与记负载，稠密的前馈什么也不用看。"""
        return self.mlp(x, ctx) if isinstance(self.mlp, MoE) else self.mlp(x)


def run_blocks(
    blocks: nn.ModuleDict,
    final_norm: nn.Module | None,
    x: Tensor,
    contexts: Sequence[Context],
    keep: Collection[int] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """逐层走一遍：嵌入 (B, T, C) -> 末尾归一化之后的 (B, T, C)，与 keep 点名的残差流。

    contexts 比层少时只走前几层。keep：i = 第 i 层之后的残差流（0 = 嵌入之后）。
    """
    kept = {0: x} if 0 in keep else {}
    for i, (block, ctx) in enumerate(zip(blocks.values(), contexts, strict=False), start=1):
        x = block(x, ctx)
        if i in keep:
            kept[i] = x
    return (x if final_norm is None else final_norm(x)), kept

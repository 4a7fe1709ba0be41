"""张量并行（Shoeybi et al. 2019, arXiv:1909.08053）与序列并行（arXiv:2205.05198）。

头、前馈的宽度与词表切到 W 个 rank；用普通张量，不用 DTensor，理由见 docs/decisions/020。

    进：c_attn、c_fc 之前     出：c_proj、嵌入之后
    sum_back                  sum_forward                 各 rank 的残差流相同
    gather_along 词元         scatter_along 词元          sequence：残差流只有自己那段词元

一步里：各 rank 读同样的批，损失各 rank 相同，份额照旧；切开的权重的梯度本来就完整；
每个 rank 只见自己的头或词元的那些参数（partial），梯度在轴上求和。范数：切开的相加，其余数一次。
检查点：whole 按 layout.py 拼。
B 批、T 词元数、C 宽度、V 词表、N = B·T、R 一块的行数。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from app.models.transformer import GPT2Model
from app.models.transformer.block import Block
from app.models.transformer.embeddings import Embeddings
from app.models.transformer.layers.linear import Linear, linear
from app.models.transformer.mlp import MLP
from app.models.transformer.visibility.positions import Positions

from ..comm import Ranks
from .layout import Axis
from .moves import gather_along, scatter_along, sum_back, sum_forward
from .vocabulary import vocabulary_cross_entropy
from .way import CutWay, check_divides, check_no_dropout, override, sum_gradients

Edge = Callable[[Tensor], Tensor]


class Heads(CutWay):
    axis: ClassVar[Axis] = "tensor"

    def __init__(self, model: GPT2Model, ranks: Ranks, sequence: bool) -> None:
        super().__init__(model, ranks)
        self.sequence = sequence

    def partial(self, name: str) -> bool:
        """name 的梯度在一个 rank 上不完整。"""
        if self.rules[name] is not None:
            return False
        return self.sequence or ".q_norm." in name or ".k_norm." in name

    def finish_gradients(self) -> None:
        named = self.model.named_parameters()
        sum_gradients([p for name, p in named if self.partial(name)], self.ranks)


def split_heads(model: GPT2Model, ranks: Ranks, sequence: bool = False) -> Heads:
    """此后 model(x, targets=y) 照旧，只是没有 logits 与缓存。

    Raises:
        ValueError: 头数、宽度、词表不能整除，有 dropout 或 MoE 层。
    """
    check_tensor(model, ranks, sequence)
    way = Heads(model, ranks, sequence)
    enter: Edge = partial(sum_back, ranks=ranks)
    leave: Edge = partial(sum_forward, ranks=ranks)
    if sequence:
        enter = partial(gather_along, dim=1, ranks=ranks)
        leave = partial(scatter_along, dim=1, ranks=ranks)
        override(model.embed, place=partial(_place, model.embed, ranks))
    override(model.embed.wte, forward=partial(_look_up, model.embed.wte, ranks, leave))
    for block in model.h.values():
        assert isinstance(block, Block) and isinstance(block.mlp, MLP)
        for branch, column in ((block.attn, block.attn.c_attn), (block.mlp, block.mlp.c_fc)):
            override(column, forward=partial(_column, column, enter))
            override(branch.c_proj, forward=partial(_row, branch.c_proj, leave))
        block.attn.heads //= ranks.size
        block.attn.kv_heads //= ranks.size
    override(model, head_loss=partial(_head_loss, model, ranks, enter), head=_no_logits)
    return way


def check_tensor(model: GPT2Model, ranks: Ranks, sequence: bool) -> None:
    """
    Raises:
        ValueError: 见 split_heads。
    """
    config = model.config
    check_no_dropout(model, "tensor", ranks)
    for name, value in (
        ("n_head", config.n_head),
        ("n_kv_head", config.kv_heads),
        ("the MLP width", config.mlp_hidden),
        ("vocab_size", config.vocab_size),
        *([("context_size", config.context_size)] if sequence else []),
    ):
        check_divides(name, value, "tensor", ranks)
    if config.moe_layers:
        raise ValueError(
            f"moe_num_experts={config.moe_num_experts} with parallel.tensor={ranks.size}: the "
            "router would see partial gradients; use parallel.expert and parallel.tensor=1"
        )


def _column(layer: Linear, enter: Edge, x: Tensor) -> Tensor:
    """输出的几行在这里：(B, t, C) -> (B, T, out / W)。"""
    return linear(enter(x), layer.weight, layer.bias)


def _row(layer: Linear, leave: Edge, x: Tensor) -> Tensor:
    """输入的几列在这里：(B, T, in / W) -> (B, t, C)；偏置加在求和之后，只加一次。"""
    y = leave(linear(x, layer.weight))
    return y if layer.bias is None else y + layer.bias


def _look_up(wte: nn.Embedding, ranks: Ranks, leave: Edge, ids: Tensor) -> Tensor:
    """别的 rank 的词在这里是零；各 rank 之和就是查表。"""
    rows = wte.weight.shape[0]
    local = ids - ranks.rank * rows
    outside = (local < 0) | (local >= rows)
    x = F.embedding(local.masked_fill(outside, 0), wte.weight)
    return leave(x.masked_fill(outside[..., None], 0.0))


def _place(embed: Embeddings, ranks: Ranks, x: Tensor, positions: Positions) -> Tensor:
    """sequence：x 只有自己那段词元，位置也取那一段。"""
    check_divides("tokens", positions.length, "tensor", ranks)
    n = x.shape[1]
    mine = positions.take(slice(ranks.rank * n, (ranks.rank + 1) * n))
    return Embeddings.place(embed, x, mine)


def _head_loss(model: GPT2Model, ranks: Ranks, enter: Edge, x: Tensor, targets: Tensor) -> Tensor:
    return vocabulary_cross_entropy(enter(x), model.head_weight, targets, ranks)


def _no_logits(x: Tensor) -> Any:
    raise ValueError(
        "logits are split over the vocabulary with parallel.tensor: give targets for the loss, "
        "or load the checkpoint in one process to generate"
    )

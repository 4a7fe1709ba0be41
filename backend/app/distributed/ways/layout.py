"""每个权重怎样切到各 rank 上：唯一的表。切、拼、范数、检查点都来问它。

| 权重                          | 轴     | 维 | 说明                               |
|-------------------------------|--------|----|------------------------------------|
| wte、lm_head                  | tensor | 0  | 词表                               |
| c_attn（权重与偏置）          | tensor | 0  | 按头；q、k、v 各自切               |
| 前馈的 c_fc（权重与偏置）     | tensor | 0  | 中间的宽度；gate、up 各自切        |
| 两种 c_proj 的权重            | tensor | 1  | 与上两行相接的输入                 |
| experts 里的一切              | expert | 0  | 整个专家                           |
| 其余（归一化、wpe、c_proj 的偏置、路由器） |  |    | 各 rank 都有一份            |

拼成的矩阵若整个等分，rank 0 得到的是全部 q 与半个 k：形状照样对，数却错（损失差千分之三）。
W 一条轴上的 rank 数。
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from app.models.transformer import GPT2Config
from app.models.transformer.layers.fused import parts_of

Axis = Literal["tensor", "expert"]

_EXPERT = re.compile(r"h\.\d+\.mlp\.experts\.")
_ROWS = re.compile(r"(embed\.wte|lm_head|h\.\d+\.(attn\.c_attn|mlp\.c_fc))\.(weight|bias)")
_COLUMNS = re.compile(r"h\.\d+\.(attn|mlp)\.c_proj\.weight")


@dataclass(frozen=True)
class Cut:
    """沿 dim 切；这一维由长 parts 的几部分相接，每一部分各等分给 W 个 rank。"""

    axis: Axis
    dim: int
    parts: tuple[int, ...]


def cut_of(name: str, shape: Sequence[int], config: GPT2Config) -> Cut | None:
    """完整的形状是 shape 的参数（或缓冲区）name 怎样切；None = 每个 rank 都有一份。"""
    if _EXPERT.match(name):
        return Cut("expert", 0, (shape[0],))
    if _ROWS.fullmatch(name):
        return Cut("tensor", 0, tuple(parts_of(name, shape[0], config).values()))
    if _COLUMNS.fullmatch(name):
        return Cut("tensor", 1, (shape[1],))
    return None


class Span(NamedTuple):
    """沿 dim：完整的张量里从 start 起的 length 个，在我那份里从 at 起。"""

    start: int
    length: int
    at: int


def spans(rule: Cut, rank: int, size: int) -> list[Span]:
    """rank 的那一份由哪几段接成；按块读写检查点时也用它。

    Raises:
        ValueError: 有一部分不能等分。
    """
    found, start, at = [], 0, 0
    for part in rule.parts:
        each, rest = divmod(part, size)
        if rest:
            raise ValueError(
                f"{part} rows or columns of a weight (parts {rule.parts}) cannot be cut evenly "
                f"over {size} {rule.axis} ranks: use a number of ranks that divides {part}"
            )
        found.append(Span(start + rank * each, each, at))
        start, at = start + part, at + each
    return found


def cut(whole: Tensor, rule: Cut | None, rank: int, size: int) -> Tensor:
    """rank 的那一份，另存一份（不拖着整个张量）。

    Raises:
        ValueError: 见 spans。
    """
    if rule is None or size == 1:
        return whole
    found = spans(rule, rank, size)
    return torch.cat([whole.narrow(rule.dim, s.start, s.length) for s in found], rule.dim)


def join(pieces: Sequence[Tensor], rule: Cut | None) -> Tensor:
    """cut 的反面：各 rank 的份，按 rank 排。"""
    if rule is None or len(pieces) == 1:
        return pieces[0]
    size = len(pieces)
    found = [(s, piece) for r, piece in enumerate(pieces) for s in spans(rule, r, size)]
    found.sort(key=lambda one: one[0].start)
    return torch.cat([piece.narrow(rule.dim, s.at, s.length) for s, piece in found], rule.dim)

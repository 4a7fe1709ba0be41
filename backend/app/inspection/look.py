"""一次看几样：只走一遍模型，要什么给什么。

T 词元数、N 层数、H 查询头数、V 词表、k 每个词元的专家数。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.models.transformer import GPT2Model
from app.models.transformer.block import residuals

from .attention import as_arrays, to_numpy
from .heads import Heads, heads
from .lens import Lens, lens
from .patterns import hidden
from .slices import Slice, Steps
from .walk import Walk, final, lengths, walk


@dataclass(frozen=True)
class Wish:
    """要看什么。cells：哪些层遮住的格子；width：词表里真有词元的部分；heads：给头打分时可以随机挑的词元
    （heads.plain_ids）；rows：lens 一片至多几行。"""

    width: int
    maps: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()
    routing: tuple[int, ...] = ()
    lens: bool = False
    norms: bool = False
    next: bool = False
    heads: tuple[int, ...] = ()
    rows: int = 64

    @property
    def walks(self) -> bool:
        return bool(self.maps or self.routing or self.lens or self.norms or self.next)


@dataclass(frozen=True)
class Norms:
    """L2 长度：stream (N+1, T) 每层之后的残差流；attention、mlp (N, T) 两个分支各加了多长的向量。

    additive：残差流恰好是嵌入与各分支之和（pre）。别处每层另有归一化或 α，分支的长度是它加进去
    时的，之后还要一起归一化，所以各份加不成整条残差流。
    """

    stream: np.ndarray
    attention: np.ndarray
    mlp: np.ndarray
    additive: bool


@dataclass(frozen=True)
class Look:
    """没有要的是空或 None。

    Attributes:
        next_logits: (V,) 下一个词元的。
        attention: {层: (H, T, T)}。
        hidden: {层: (T, T)} bool，图样不许看的格子。
        routing: {层: (专家 (T, k)，权重 (T, k))}。
    """

    next_logits: np.ndarray | None
    attention: dict[int, np.ndarray]
    hidden: dict[int, np.ndarray]
    routing: dict[int, tuple[np.ndarray, np.ndarray]]
    lens: Lens | None
    norms: Norms | None
    heads: Heads | None


def look(model: GPT2Model, ids: Sequence[int], wish: Wish) -> Steps[Look]:
    """
    Raises:
        ValueError: 见 walk 与 heads。
    """
    found, logits, prophecy, scores = Walk(), None, None, None
    cells: dict[int, np.ndarray] = {}
    if wish.cells:
        yield Slice(len(ids), len(wish.cells) * len(ids))
        shown = hidden([model.patterns[layer] for layer in wish.cells], len(ids))
        cells = dict(zip(wish.cells, shown, strict=True))
    if wish.walks:
        found = yield from walk(model, ids, wish.maps, wish.routing)
    if wish.next:
        yield Slice(1, wish.width * model.config.n_embed)
        logits = to_numpy(final(model, found.streams[-1][-1:], wish.width)[0])
    if wish.lens:
        prophecy = yield from lens(model, found.streams, ids, wish.width, wish.rows)
    if wish.heads:
        scores = yield from heads(model, wish.heads)
    return Look(
        logits, as_arrays(found.maps), cells, routing_arrays(found), prophecy,
        norms(model, found) if wish.norms else None, scores,
    )  # fmt: skip


def routing_arrays(found: Walk) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{层: (专家 (T, k)，权重 (T, k))}。"""
    return {
        layer: (expert.cpu().numpy(), to_numpy(weight))
        for layer, (expert, weight) in found.routing.items()
    }


def norms(model: GPT2Model, found: Walk) -> Norms:
    stream = torch.stack([lengths(x) for x in found.streams])
    additive = all(
        around.alpha == 1 and not around.outer
        for layer in range(model.config.n_layer)
        for around in residuals(model.config, layer)
    )
    return Norms(
        to_numpy(stream), to_numpy(torch.stack(found.attention)), to_numpy(torch.stack(found.mlp)),
        additive,
    )  # fmt: skip

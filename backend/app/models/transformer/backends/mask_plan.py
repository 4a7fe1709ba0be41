"""掩码计划：一次前向里一种图样怎样落到计算上。每种图样只做一次，各层共用。

B 批、Tq 查询数、Tk 键数、n 一行里点名的全局词元数的上限。
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import Backend
from ..visibility.pattern import CAUSAL, Pattern
from ..visibility.positions import PADDING, Positions
from ..visibility.rule import visible
from .choose import Case, Name, choose_backend
from .tiles import Tiling, tile

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class GlobalQueries:
    """点名的全局词元看得见一切，单独按稠密的行来算（Longformer）。

    index (B, n)：它们的下标，各行个数不同时以别的查询补齐（多算一遍，结果相同）；
    mask (B, 1, n, Tk)。
    """

    index: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Part:
    """没有填充的一步里，相连的几行各有几个词元：tokens 是查询中的，rows 与 keys 是键中的。"""

    tokens: slice
    rows: slice
    keys: int
    plan: MaskPlan


@dataclass(frozen=True)
class MaskPlan:
    """backend 决定用哪一项：sdpa 用 causal 或 mask；blocked 用 tiling；reference 用坐标；flex 用
    blocks；parts 用 parts：各有自己的计划。

    Attributes:
        causal: SDPA 自带的因果标志就是全部的遮蔽。
        mask: (B|1, 1, Tq, Tk) bool；None = 不需要。
    """

    q: Positions
    k: Positions
    pattern: Pattern
    backend: Name
    reason: str
    causal: bool = False
    mask: Tensor | None = None
    tiling: Tiling | None = None
    global_queries: GlobalQueries | None = None
    parts: tuple[Part, ...] = ()
    blocks: BlockMask | None = None

    @classmethod
    def build(
        cls,
        q: Positions,
        k: Positions,
        pattern: Pattern = CAUSAL,
        *,
        asked: Backend = "auto",
        dtype: torch.dtype = torch.float32,
        head_dim: int = 64,
        dropout: float = 0.0,
        grad: bool = False,
    ) -> MaskPlan:
        """选后端并备好它要的东西。选择不读张量的值，不会打断设备。

        Raises:
            ValueError: 点名的后端做不了这件事。
        """
        square, last = _alignment(q, k, pattern)
        case = Case(
            pattern, q.length, k.length, square or last, _own_keys(q, k),
            q.pos.device, dtype, head_dim, dropout, grad,
        )  # fmt: skip
        backend, reason = choose_backend(asked, case)
        plan = partial(cls, q, k, pattern, backend, reason)
        if backend == "blocked":
            tiling = tile(pattern, q, torch.promote_types(dtype, torch.float32))
            return plan(tiling=tiling, global_queries=_global_queries(q, pattern))
        if backend == "flex":
            # torch 的 FlexAttention 导入很慢，用到才导入。
            from .flex import blocks_of

            return plan(blocks=blocks_of(pattern, q, k))
        if backend == "sdpa" and not (square or last):
            return plan(mask=visible(q, k, pattern)[:, None])
        return plan(causal=square)

    def dense(self) -> Tensor:
        """任何形式的稠密写法，给参考路径：(B|1, 1, Tq, Tk) bool。"""
        return visible(self.q, self.k, self.pattern)[:, None] if self.mask is None else self.mask

    def in_order(self, maps: Tensor) -> Tensor:
        """maps (B, H, Tq, Tk) 的键从槽的次序（环形缓存）换成位置的次序，空槽在最后。"""
        if self.k.start is not None or self.k.dense:
            return maps
        key = self.k.pos.masked_fill(self.k.pos == PADDING, torch.iinfo(torch.int64).max)
        order = key.argsort(dim=1, stable=True)
        if self.k.segment is not None:
            order = order.gather(
                1, self.k.segment.expand_as(key).gather(1, order).argsort(dim=1, stable=True)
            )
        return maps.gather(3, order[:, None, None].expand(len(maps), *maps.shape[1:3], -1))


def _alignment(q: Positions, k: Positions, pattern: Pattern) -> tuple[bool, bool]:
    """(查询与键同起同止, 只有最后一个查询)，且这么长的上下文里图样与 causal 相同。"""
    if q.start is None or k.start is None or q.start + q.length > pattern.solid:
        return False, False
    if (q.marked is not None or k.marked is not None) and pattern.takes_marks:
        return False, False
    square = q.start == k.start and q.length == k.length
    return square, not square and q.length == 1 and q.start == k.start + k.length - 1


def _global_queries(q: Positions, pattern: Pattern) -> GlobalQueries | None:
    if q.marked is None or not pattern.takes_marks:
        return None
    n = int(q.marked.sum(1).max())
    if n == 0:
        return None
    index = q.marked.byte().argsort(dim=1, descending=True, stable=True)[:, :n]
    return GlobalQueries(index, visible(q.take(index), q, pattern)[:, None])


def _own_keys(q: Positions, k: Positions) -> bool:
    """键就是这些查询自己的键。空缓存的第一块也是：它给出的坐标是另一个相等的对象。"""
    same = q.start is not None and q.start == k.start and q.length == k.length
    return q.dense and (q is k or (same and q.marked is k.marked))

"""缓存做不到的事：逐条说清，点名两个值与改法。

B 行、T 本次词元数；到达序号与环见 slots.py。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import Position
from ..visibility.positions import PADDING, Positions
from .slots import Coordinates, Layout

_FIX = "use KVCache.for_model(..., ring=False)"


class Cache(Protocol):
    """检查要看的；见 KVCache。"""

    @property
    def batch_size(self) -> int: ...
    @property
    def keys(self) -> list[Tensor]: ...


def check_use(
    cache: Cache | None, use_cache: bool, return_cache: bool, rows: int, n_layer: int
) -> None:
    """
    Raises:
        ValueError: 开关互相矛盾，或缓存的行数、层数不合这次前向。
    """
    if not use_cache and (cache is not None or return_cache):
        given = "cache" if cache is not None else "return_cache=True"
        raise ValueError(f"{given} was given with use_cache=False: pass use_cache=True as well")
    if cache is not None and cache.batch_size != rows:
        raise ValueError(
            f"the cache has {cache.batch_size} rows but input_ids has {rows}: "
            "use cache.reorder(rows) or a new cache"
        )
    if cache is not None and len(cache.keys) != n_layer:
        raise ValueError(
            f"the cache has {len(cache.keys)} layers but the model has n_layer={n_layer}: "
            "allocate it with KVCache.for_model(model.config, ...)"
        )


def check_keepable(rings: list[Layout], new: Positions) -> None:
    """环按到达的先后淘汰：要永远可见的、要另一个前缀的，都留不住。

    Raises:
        ValueError: 有环，而本次点名了全局词元；或环钉住前缀，而本次是打包的文档。
    """
    if not rings:
        return
    pinned = max(layout.pinned for layout in rings)
    if new.marked is not None:
        raise ValueError(
            "tokens marked as global must stay visible for ever, but the cache keeps only "
            f"a ring of {rings[0].capacity} tokens: {_FIX}"
        )
    if pinned and new.segment is not None:
        raise ValueError(
            f"segment_ids with a ring cache that pins the first {pinned} tokens of a row: "
            f"a later document would need its own; {_FIX}"
        )


def check_rising(new: Positions, last: tuple[Tensor, Tensor]) -> None:
    """环按到达的先后淘汰，所以用户自定的位置在同一文档里必须递增。

    last: 各行上一个真词元的 (pos, segment)，各 (B, 1)。

    Raises:
        ValueError: 位置不递增。
    """
    rows = last[0].shape[0]
    pos = torch.cat([last[0], new.pos.expand(rows, -1)], 1)
    columns = torch.arange(pos.shape[1], device=pos.device)
    real = pos[:, 1:] != PADDING
    # 每个词元之前最近的真词元在哪一列；第 0 列是上一块的最后一个。
    seen = torch.where(real, columns[1:], 0).cummax(1).values
    before = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], 1)
    floor = pos.gather(1, before)
    if new.segment is not None:
        segment = torch.cat([last[1], new.segment.expand(rows, -1)], 1)
        floor = floor.masked_fill(segment.gather(1, before) != segment[:, 1:], PADDING)
    wrong = real & (pos[:, 1:] <= floor)
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"row {row} has position {int(pos[row, column + 1])} after position "
            f"{int(floor[row, column])}: a ring cache drops keys in order of arrival, so positions "
            f"must increase; pass increasing positions or {_FIX}"
        )


def check_rollback(
    rings: list[Layout], top: int | Tensor, max_chunk: int, new: Tensor, old: Tensor
) -> None:
    """new、old (B,) 回滚之后与之前的长度；top：环写到过的最远处。

    序号从 top - ring 起都在，而查询 n 要看到 n - reach + 1，所以至多回到 top - max_chunk；
    没有绕回过的环、退回到钉住的前缀之内，则不限。

    Raises:
        ValueError: 环里已没有回滚之后要看的键。
    """
    for layout in rings:
        highest = torch.as_tensor(top, device=new.device).expand_as(new)
        kept = (new >= highest - max_chunk) | (highest <= layout.capacity)
        wrong = ~(kept | (new <= layout.pinned) | (new == old))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            written, wanted = int(highest[row]), int(new[row])
            raise ValueError(
                f"cannot truncate to {wanted} tokens: the ring was written up to {written} and "
                f"with max_chunk={max_chunk} goes back to {written - max_chunk}; use "
                f"KVCache.for_model(..., max_chunk={written - wanted}) or ring=False"
            )


def check_evictable(
    keep_first: int,
    keep_last: int,
    position: Position,
    rerotate: Callable[..., Any] | None,
    table: Coordinates | None,
    explicit: bool,
) -> None:
    """位置能在缓存之内重新数，才能丢掉中段。

    Raises:
        ValueError: 见 KVCache.evict。
    """
    if keep_first < 0 or keep_last < 1:
        raise ValueError(
            f"keep_first={keep_first} must be at least 0 and keep_last={keep_last} at least 1"
        )
    if position == "learned":
        raise ValueError(
            "evict renumbers positions, but with position='learned' the stored keys carry the old "
            "ones: use a model with position='rope' or 'none', or generate with overflow='slide'"
        )
    if (rerotate is None) == (position == "rope"):
        raise ValueError(
            f"evict with position={position!r} and rerotate={rerotate}: RoPE keys must be turned "
            "back when they move, others must not; pass rerotate with position='rope' only"
        )
    odd = explicit or (table is not None and (table.segment, table.marked) != (None, None))
    if odd:
        raise ValueError(
            "evict renumbers positions from 0, but the cache holds packed documents, marked tokens "
            "or positions given by hand: use a cache without them, or truncate(0)"
        )

"""给服务用的缓存：S 行各自来去，一步里各行各写几个词元（跨度），没有填充。

KVCache 的长度可以在加速器上，各行一起走；这里的长度是主机上的整数，行可以单独回滚、清空、
互相抄前缀。槽的算术（Layout）与存储（Store）是同一份，所以环与 int8 的键值照旧。
S 行数、N 一步的词元数、G 键值头数、D 头宽。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..config import GPT2Config
from ..visibility.pattern import Pattern
from ..visibility.positions import Positions
from .kv_cache import KVCache
from .slots import Layout
from .store import Runs, Scatter

# 清零时多清这么多槽：不必每个词元都来一遍。
_AHEAD = 64


@dataclass(frozen=True)
class Span:
    """第 row 行接着写 count 个词元。"""

    row: int
    count: int


@dataclass(frozen=True)
class Sight:
    """相连的几行各看什么：rows 是 RowStep.block 之内的，tokens 是 N 个之中的。

    q、k：查询与 write 返回的键的坐标；keys：看前多少个槽。
    """

    tokens: slice
    rows: slice
    keys: int
    q: Positions
    k: Positions


@dataclass(frozen=True)
class RowStep:
    """一次前向对缓存的读写；RowCache.commit 之后才算数。

    where: (N, 1) 各词元的位置，每个词元自成一行；block: 这一步碰到的行，从最小到最大。
    """

    cache: RowCache
    spans: tuple[Span, ...]
    where: Positions
    block: slice
    slots: dict[Layout, Runs | Scatter]
    sights: dict[Layout, tuple[Sight, ...]]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k、v (N, G, 1, D) -> block 各行的全部键与值 (R, G, S', D)，怎样看由 sights 说。"""
        layout = self.cache.layouts[layer]
        high = max(sight.keys for sight in self.sights[layout])
        seen = []
        where = self.slots[layout]
        for store, new in zip(self.cache.stores[layer], (k, v), strict=True):
            rows = store.view(self.block)
            if isinstance(where, Runs):
                rows.write(where, new.permute(2, 1, 0, 3))
            else:
                store.write(where, new)
            seen.append(rows.read(slice(high)))
        return seen[0], seen[1]

    def of_layer(self, layer: int) -> tuple[Sight, ...]:
        return self.sights[self.cache.layouts[layer]]


class RowCache:
    """S 行的键与值。

    Attributes:
        lengths: 各行已存的词元数，只读。
        stores: 每层一对 (键, 值)；layouts: 每层的槽位布局。
    """

    def __init__(
        self, config: GPT2Config, rows: int, max_len: int | None = None, *, ring: bool = False,
        max_chunk: int = 256, **options: Any,
    ) -> None:  # fmt: skip
        """max_chunk: 一次至多写多少、环里至多回滚多少；其余见 KVCache.for_model。"""
        whole = KVCache.for_model(config, rows, max_len, ring=ring, max_chunk=max_chunk, **options)
        self.max_len, self.max_chunk = whole.max_len, max_chunk
        self.stores = whole.stores
        room = max_chunk if ring else None
        by_pattern: dict[Pattern, Layout] = {
            pattern: Layout.of(pattern, whole.max_len, room) for pattern in config.patterns
        }
        self.layouts = [by_pattern[pattern] for pattern in config.patterns]
        self.lengths = [0] * rows
        self.nbytes = whole.nbytes
        self._rings = [layout for layout in set(self.layouts) if layout.reach is not None]
        # 环写到过的最远处；没有写过的槽里是什么都可能，_clean 之前的都写过有限的数。
        self._tops, self._clean = [0] * rows, [0] * rows

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.stores[0][0].parts[0].device

    def begin(self, spans: Sequence[Span], padded: bool = False) -> RowStep:
        """padded: 每行一个词元的相连的几行合成一次注意力，短的行补到最长（键要清零）。

        Raises:
            ValueError: 没有这一行，一行出现两次，放不下，或一次写得比环留的余地多。
        """
        self._check(spans)
        starts = [self.lengths[span.row] for span in spans]
        pos = [
            n for at, span in zip(starts, spans, strict=True) for n in range(at, at + span.count)
        ]
        rows = [span.row for span in spans for _ in range(span.count)]
        where = torch.tensor(pos, device=self.device)[:, None]
        index = torch.tensor(rows, device=self.device)[:, None]
        touched = slice(min(rows), max(rows) + 1)
        sights: dict[Layout, tuple[Sight, ...]] = {}
        slots: dict[Layout, Runs | Scatter] = {}
        for layout in dict.fromkeys(self.layouts):
            if len(spans) == 1:
                # 只有一行时切片比散写快一半，单行解码量得出来。
                slots[layout] = layout.runs(starts[0], starts[0] + len(pos))
            else:
                slots[layout] = Scatter(index, layout.slot(where))
            sights[layout] = (
                (self._together(layout, spans, where, touched.start),)
                if padded
                else tuple(self._apart(layout, spans, touched.start))
            )
        self._reach(spans)
        return RowStep(self, tuple(spans), Positions(where), touched, slots, sights)

    def reserve(self, spans: Sequence[Span]) -> None:
        """调用者自己把键值写进 stores，不要 RowStep：先记下写到哪里，之后同样 commit 或 abandon。

        Raises:
            ValueError: 同 begin。
        """
        self._check(spans)
        self._reach(spans)

    def _reach(self, spans: Sequence[Span]) -> None:
        for span in spans:
            end = self.lengths[span.row] + span.count
            self._tops[span.row] = max(self._tops[span.row], end)
            self._clean[span.row] = max(self._clean[span.row], end)

    def commit(self, spans: Sequence[Span]) -> None:
        """前向完整之后才让新词元生效。"""
        for span in spans:
            self.lengths[span.row] += span.count

    def abandon(self, spans: Sequence[Span]) -> None:
        """前向中途失败：写了一半的槽里可能是任何数，用之前要清零。"""
        for span in spans:
            self._clean[span.row] = min(self._clean[span.row], self.lengths[span.row])

    def truncate(self, row: int, length: int) -> None:
        """只留前 length 个；更短则不变。

        Raises:
            ValueError: 负数，或环里已没有回滚之后要看的键。
        """
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        if length >= self.lengths[row]:
            return
        if not self.keeps(row, length):
            raise ValueError(
                f"row {row} cannot go back to {length} tokens: its ring was written up to "
                f"{self._tops[row]} and with max_chunk={self.max_chunk} goes back to "
                f"{self._tops[row] - self.max_chunk}; use reset({row}) or ring=False"
            )
        self.lengths[row] = length
        self._tops[row] = self._top_after(row, length)

    def reset(self, row: int, poisoned: bool = False) -> None:
        """清空一行；poisoned：里面有 NaN，被遮住的 NaN 乘以权重 0 仍是 NaN，所以要清零。"""
        self.lengths[row] = self._tops[row] = 0
        if poisoned:
            self._clean[row] = 0

    def keeps(self, row: int, length: int) -> bool:
        """这一行的前 length 个词元还能接着用吗：环里要留着它们之后的查询要看的（limits.py）。"""
        top = self._tops[row]
        return length <= self.lengths[row] and all(
            length >= top - self.max_chunk or top <= ring.capacity or length <= ring.pinned
            for ring in self._rings
        )

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """target 的内容换成 source 的前 length 个词元，原样不经解码。

        source 在用也可以：因果的键值不看后来的词元。

        Raises:
            ValueError: source 没有那么多，或它的环里已不全；抄到自己。
        """
        if source == target or not self.keeps(source, length):
            raise ValueError(
                f"row {source} with {self.lengths[source]} tokens cannot lend its first {length} "
                f"to row {target}: compute them instead"
            )
        for layout, (keys, values) in zip(self.layouts, self.stores, strict=True):
            wrapped = self._tops[source] > layout.capacity
            used = layout.capacity if wrapped else min(length, layout.capacity)
            for store in (keys, values):
                store.copy(source, target, used)
        self.lengths[target] = length
        self._tops[target] = self._top_after(source, length)
        self._clean[target] = max(self._clean[target], self._tops[target])

    def _top_after(self, row: int, length: int) -> int:
        """退回到 length 之后：没有绕回过、或退到钉住的前缀之内，就与没有写过一样。"""
        top = self._tops[row]
        fresh = all(top <= ring.capacity or length <= ring.pinned for ring in self._rings)
        return length if fresh else top

    def _apart(self, layout: Layout, spans: Sequence[Span], low: int) -> list[Sight]:
        """每个跨度各看各的：一个多余的键也不碰。"""
        found, ends = [], list(accumulate(span.count for span in spans))
        for span, stop in zip(spans, ends, strict=True):
            start = self.lengths[span.row]
            end = start + span.count
            keys = min(end, layout.capacity)
            q = Positions.plain(start, span.count, self.device)
            if end <= layout.capacity:
                k = Positions.plain(0, end, self.device)
            else:
                k = Positions(self._arrivals(layout, keys, [end]))
            row = span.row - low
            found.append(Sight(slice(stop - span.count, stop), slice(row, row + 1), keys, q, k))
        return found

    def _together(self, layout: Layout, spans: Sequence[Span], where: Tensor, low: int) -> Sight:
        ends = [self.lengths[span.row] + 1 for span in spans]
        keys = min(max(ends), layout.capacity)
        for span in spans:
            self._clear(span.row, max(ends))
        q, k = Positions(where), Positions(self._arrivals(layout, keys, ends))
        if min(ends) == max(ends) <= layout.capacity:
            q = Positions.plain(ends[0] - 1, 1, self.device)
            k = Positions.plain(0, keys, self.device)
        return Sight(slice(0, len(spans)), slice(0, len(spans)), keys, q, k)

    def _arrivals(self, layout: Layout, keys: int, ends: list[int]) -> Tensor:
        slots = torch.arange(layout.capacity, device=self.device)
        return layout.arrivals(slots, torch.tensor(ends, device=self.device)[:, None])[:, :keys]

    def _clear(self, row: int, end: int) -> None:
        begin = self._clean[row]
        if begin >= end:
            return
        end += _AHEAD
        for layout, pair in zip(self.layouts, self.stores, strict=True):
            for store in pair:
                store.view(slice(row, row + 1)).clear(
                    min(begin, layout.capacity), min(end, layout.capacity)
                )
        self._clean[row] = end

    def _check(self, spans: Sequence[Span]) -> None:
        rows = [span.row for span in spans]
        if not rows or len(set(rows)) < len(rows) or not 0 <= min(rows) <= max(rows) < self.rows:
            raise ValueError(
                f"spans name rows {rows}: give each of the {self.rows} rows at most once"
            )
        for span in spans:
            end = self.lengths[span.row] + span.count
            if span.count < 1 or (self.max_len is not None and end > self.max_len):
                raise ValueError(
                    f"row {span.row} holds {self.lengths[span.row]} tokens and {span.count} more "
                    f"were given: at least 1 and up to max_len={self.max_len} in all"
                )
            if self._rings and span.count > self.max_chunk:
                raise ValueError(
                    f"{span.count} tokens at once in row {span.row}, but the rings leave room for "
                    f"max_chunk={self.max_chunk}: give fewer, or allocate with a larger max_chunk"
                )

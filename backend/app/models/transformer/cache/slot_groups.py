"""布局相同的几层：它们共用的槽位表，以及一次前向里怎样读写。

B 行、S 槽数、T 本次词元数；到达序号、槽与环见 slots.py。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..visibility.positions import PADDING, Positions
from .slots import Coordinates, Layout
from .store import Runs, Scatter


@dataclass(frozen=True)
class Chunk:
    """步调不一的一块。past、high：写之前、之后最长一行的上界，不必等设备。

    arrival、real (B, T)：到达序号，是否真词元；lengths (B,)：写完之后的长度；rows (B, 1)。
    """

    arrival: Tensor
    real: Tensor
    lengths: Tensor
    rows: Tensor
    past: int
    high: int


@dataclass(frozen=True)
class Access:
    """一次前向里一组层怎样读写。

    keys: write 返回的键的坐标。
    where: 写到哪些槽。
    slots: 就地写完再读这些槽；None = 看的是 before 这几段槽接上新来的，提交时才写。
    table: 提交之后的坐标表。
    """

    keys: Positions
    where: Runs | Scatter
    slots: slice | None = None
    before: tuple[slice, ...] = ()
    table: Coordinates | None = None


@dataclass(frozen=True)
class Move:
    """挪动之后的槽：target 这几槽的内容来自 source (B|1, n)，其中 shifted 的位置变了。

    pos (B|1, S)：每个槽的新位置。环里已没有的键都在 reach 之外，位置照算也看不见。
    """

    source: Tensor
    target: slice
    shifted: Tensor
    pos: Tensor


class Group:
    """布局相同的几层：共用一张槽位表。"""

    def __init__(self, layout: Layout, layers: list[int], device: torch.device | str) -> None:
        self.layout, self.layers = layout, layers
        self.slots = torch.arange(layout.capacity, device=device)
        # 各行步调不一致之后才有。
        self.table: Coordinates | None = None
        # 这个槽号之前都写过有限的数。空槽虽被遮住，垃圾里的 NaN 乘以权重 0 仍是 NaN，
        # 所以读到之前要清零。
        self.clean = 0

    def aligned(self, new: Positions, begin: int, max_chunk: int) -> Access:
        """各行都从 begin 写起。"""
        layout, device, end = self.layout, self.slots.device, begin + new.length
        runs = layout.runs(begin, end)
        if begin == 0:
            # 看的就是新来的 k、v 本身：长提示照样走只对自己的键打分的快路径。
            return Access(new, runs)
        if end <= layout.capacity:
            return Access(Positions.plain(0, end, device), runs, slice(end))
        if end - begin <= max_chunk:
            newest = end - 1
            pos = newest - (newest - self.slots) % layout.ring
            if layout.pinned:
                pos[: layout.pinned] = self.slots[: layout.pinned]
            return Access(Positions(pos[None]), runs, slice(layout.capacity))
        return self._over_long(begin, end, runs)

    def _over_long(self, begin: int, end: int, runs: Runs) -> Access:
        """写进去会盖掉自己要看的键：先读钉住的与最近的 reach - 1 个，按到达的次序。"""
        layout, device = self.layout, self.slots.device
        assert layout.reach is not None
        pinned = min(layout.pinned, begin)
        low = max(pinned, begin - layout.reach + 1)
        held = (*layout.runs(0, pinned).spans, *layout.runs(low, begin).spans)
        before = tuple(slots for slots, _ in held)
        if pinned == 0 or low == pinned:
            low = 0 if low == pinned else low
            return Access(Positions.plain(low, end - low, device), runs, before=before)
        pos = torch.cat([self.slots[:pinned], torch.arange(low, end, device=device)])
        return Access(Positions(pos[None]), runs, before=before)

    def ragged(self, new: Positions, chunk: Chunk, max_chunk: int) -> Access:
        """各行写各自的 chunk.arrival。"""
        layout, table = self.layout, self.table
        assert table is not None
        slots = layout.slot(chunk.arrival)
        in_place = new.length <= max_chunk or chunk.high <= layout.capacity
        real = chunk.real
        if not in_place:
            # 同一块里会被后来者盖掉的不写：同一槽写两次，谁留下没有保证。
            recent = chunk.arrival >= chunk.lengths[:, None] - layout.ring
            real = real & (recent | (chunk.arrival < layout.pinned))
        slots = slots.masked_fill(~real, layout.capacity)
        where, after = Scatter(chunk.rows, slots), table.put(slots, new)
        if chunk.past == 0:
            return Access(new, where, table=after)
        if in_place:
            high = min(chunk.high, layout.capacity)
            return Access(after.view(high), where, slice(high), table=after)
        high = min(chunk.past, layout.capacity)
        before = (slice(0, high),)
        return Access(table.followed_by(high, new), where, before=before, table=after)

    def leave_uniform(self, lengths: Tensor, length: int) -> None:
        arrivals = self.layout.arrivals(self.slots, lengths[:, None])
        pos = torch.cat([arrivals, torch.full_like(arrivals[:, :1], PADDING)], 1)
        self.table = Coordinates(pos)
        self.clean = max(self.clean, min(length, self.layout.capacity))

    def plan_move(
        self, lengths: Tensor, delta: Tensor, keep_first: int, kept: int, top: int | Tensor
    ) -> Move:
        """前 keep_first 个之后的，位置都往前挪 delta，之后最长一行有 kept 个。

        lengths、delta (B|1,)；top 见 KVCache。

        Raises:
            ValueError: 挪过之后要看的键，环里已经没有。
        """
        layout, shift, left = self.layout, delta[:, None], (lengths - delta)[:, None]
        new = layout.arrivals(self.slots, left)
        shifted = new >= keep_first
        old = torch.where(shifted, new + shift, new)
        if layout.reach is not None:
            highest = torch.as_tensor(top, device=new.device).expand_as(lengths)[:, None]
            held = (old < layout.pinned) | (old >= highest - layout.ring)
            needed = (new >= 0) & ((new < layout.pinned) | (new > left - layout.reach))
            if bool((needed & ~held & (shift > 0)).any()):
                raise ValueError(
                    f"a layer with a ring of {layout.capacity} slots (pinned={layout.pinned}, "
                    f"reach={layout.reach}) no longer holds what it would see next with "
                    f"keep_first={keep_first} and {kept - keep_first} last tokens: use "
                    f"keep_first={layout.pinned}, or KVCache.for_model(..., ring=False)"
                )
        low = keep_first if layout.reach is None else min(keep_first, layout.pinned)
        target = slice(low, min(kept, layout.capacity))
        source = layout.slot(old.clamp(min=0))[:, target]
        return Move(source, target, shifted[:, target], new)

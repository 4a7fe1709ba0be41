"""槽位的算术，以及每个槽里是什么坐标。环形缓存的下标只在这里算。

B 行、S 槽数、T 本次词元数；n 是到达序号：一行的第几个真词元，从 0 起。
一组槽的布局是 [最前 pinned 个 | 环]：序号 n 的槽是 n（n < pinned），
否则 pinned + (n - pinned) % ring。容量够装下一切时环从不绕回，槽号就是序号。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..visibility.pattern import Pattern
from ..visibility.positions import Positions
from .store import Runs


@dataclass(frozen=True)
class Layout:
    """一组层共用的布局。reach 为 None：不是环，什么都留着。"""

    capacity: int
    pinned: int = 0
    reach: int | None = None

    @classmethod
    def of(cls, pattern: Pattern, max_len: int | None, max_chunk: int | None) -> Layout:
        """有界的图样用环；max_chunk 为 None（不要环）或环不比 max_len 小则每个词元一槽。

        环比 reach 多 max_chunk - 1：一块里第一个查询要的键，不会被这一块最后一个词元盖掉。
        """
        if pattern.reach is not None and max_chunk is not None:
            # 至少留两个：last() 要看回滚之后的最后一个词元。
            reach = max(pattern.reach, 2)
            capacity = pattern.pinned + reach + max_chunk - 1
            if max_len is None or capacity < max_len:
                return cls(capacity, pattern.pinned, reach)
        assert max_len is not None
        return cls(max_len)

    @property
    def ring(self) -> int:
        return self.capacity - self.pinned

    def slot(self, n: Tensor) -> Tensor:
        """到达序号 -> 槽号。"""
        if self.reach is None:
            return n
        around = self.pinned + (n - self.pinned) % self.ring
        return torch.where(n < self.pinned, n, around) if self.pinned else around

    def runs(self, begin: int, end: int) -> Runs:
        """序号 begin..end-1 写到哪几段槽里；会被这同一批盖掉的那些不写。"""
        spans: list[tuple[slice, slice | None]] = []
        n = begin
        while n < end:
            if n >= self.pinned:
                n = max(n, end - self.ring)
            first = n if n < self.pinned else self.pinned + (n - self.pinned) % self.ring
            # 在钉住的前缀里先停在边上，好让环的那一段跳过会被盖掉的。
            edge = self.pinned if n < self.pinned else self.capacity
            size = min(end - n, edge - first)
            columns = None if size == end - begin else slice(n - begin, n - begin + size)
            spans.append((slice(first, first + size), columns))
            n += size
        return Runs(tuple(spans))

    def arrivals(self, slots: Tensor, lengths: Tensor) -> Tensor:
        """slots (S,)、lengths (B, 1) -> (B, S)：每个槽里最后到达的序号，没有写过则为 -1。"""
        newest = lengths - 1
        ring = newest - (newest - slots) % self.ring
        ring = ring.masked_fill(ring < self.pinned, -1)
        prefix = torch.where(slots < lengths, slots, -1)
        return torch.where(slots < self.pinned, prefix, ring)


@dataclass(frozen=True)
class Coordinates:
    """一组槽的坐标表，各 (B, S+1)，最后一列是填充的去处。不就地改：前向失败则旧表仍在。"""

    pos: Tensor
    segment: Tensor | None = None
    marked: Tensor | None = None

    def ready_for(self, new: Positions) -> Coordinates:
        """补上新坐标才有的表：此前的词元都属于 0 号文档，没有点名。"""
        segment, marked = self.segment, self.marked
        if new.segment is not None and segment is None:
            segment = torch.zeros_like(self.pos)
        if new.marked is not None and marked is None:
            marked = torch.zeros_like(self.pos, dtype=torch.bool)
        return Coordinates(self.pos, segment, marked)

    def put(self, slots: Tensor, new: Positions) -> Coordinates:
        """slots (B, T)。"""
        old = self.ready_for(new)

        def write(table: Tensor | None, values: Tensor | None) -> Tensor | None:
            if table is None:
                return None
            if values is None:
                values = table.new_zeros(1, 1)
            return table.scatter(1, slots, values.expand_as(slots))

        pos = old.pos.scatter(1, slots, new.pos.expand_as(slots))
        return Coordinates(pos, write(old.segment, new.segment), write(old.marked, new.marked))

    def with_pos(self, pos: Tensor) -> Coordinates:
        """pos (B, S)：各槽换成这些位置，-1 = 当作空。"""
        return Coordinates(torch.cat([pos, self.pos[:, -1:]], 1), self.segment, self.marked)

    def rows(self, rows: Tensor) -> Coordinates:
        return Coordinates(
            self.pos[rows],
            None if self.segment is None else self.segment[rows],
            None if self.marked is None else self.marked[rows],
        )

    def view(self, high: int) -> Positions:
        """前 high 个槽。"""
        return Positions(
            self.pos[:, :high],
            None if self.segment is None else self.segment[:, :high],
            marked=None if self.marked is None else self.marked[:, :high],
        )

    def followed_by(self, high: int, new: Positions) -> Positions:
        """前 high 个槽，后面接着还没有写入的新词元。"""
        old = self.ready_for(new).view(high)

        def join(table: Tensor | None, values: Tensor | None) -> Tensor | None:
            if table is None:
                return None
            if values is None:
                values = table.new_zeros(1, 1)
            return torch.cat([table, values.expand(table.shape[0], new.length)], 1)

        pos = torch.cat([old.pos, new.pos.expand(old.pos.shape[0], -1)], 1)
        return Positions(pos, join(old.segment, new.segment), marked=join(old.marked, new.marked))

    @property
    def nbytes(self) -> int:
        tables = (self.pos, self.segment, self.marked)
        return sum(table.nbytes for table in tables if table is not None)

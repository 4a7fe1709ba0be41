"""每个词元的坐标：行内位置与文档号。填充、打包、缓存都只是坐标，不是掩码。

B 批、T 本次词元数；pos 与 segment 的批维可以是 1（各行相同）。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Positions:
    """坐标。

    Attributes:
        pos: (B|1, T) int64，行内位置；-1 = 填充。
        segment: (B|1, T) int64，文档号；None = 每行只有一个文档。
        start: 静态事实：不为 None 时各行都是 start, start+1, …，无填充、无打包。
            有它才能不看张量的值就选最快的路径。
        marked: (B|1, T) bool，本次点名的全局词元（Longformer）；None = 没有。
        dense: 静态事实：同一行同一文档里，下标之差等于位置之差。
            有它才能按下标切窗口、按下标折叠；用户自定的位置、环形缓存的槽都没有它。
    """

    pos: Tensor
    segment: Tensor | None = None
    start: int | None = None
    marked: Tensor | None = None
    dense: bool = False

    @property
    def length(self) -> int:
        return self.pos.shape[1]

    @property
    def rows(self) -> int:
        """批维：B，各行相同则为 1。"""
        tables = (self.pos, self.segment, self.marked)
        return max(len(table) for table in tables if table is not None)

    def take(self, index: slice | Tensor) -> Positions:
        """一段，或 (B|1, n) 的下标；越界的下标当作填充。"""
        if isinstance(index, slice):
            segment = None if self.segment is None else self.segment[:, index]
            marked = None if self.marked is None else self.marked[:, index]
            return Positions(self.pos[:, index], segment, marked=marked)
        rows = max(self.rows, len(index))
        index = index.expand(rows, -1)
        inside = index < self.length
        index = index.clamp(max=self.length - 1)

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.expand(rows, -1).gather(1, index)

        pos = pick(self.pos)
        assert pos is not None
        return Positions(
            pos.masked_fill(~inside, PADDING), pick(self.segment), marked=pick(self.marked)
        )

    @classmethod
    def plain(cls, start: int, length: int, device: torch.device) -> Positions:
        pos = torch.arange(start, start + length, device=device)[None]
        return cls(pos, start=start, dense=True)

    @classmethod
    def padded(cls, mask: Tensor, past: Tensor | int = 0) -> Positions:
        """mask (B, T)：1 词元、0 填充，填充在哪一侧都可以；past (B, 1)：各行已有的长度。"""
        real = mask != 0
        pos = real.long().cumsum(1) - 1 + past
        return cls(pos.masked_fill(~real, PADDING), dense=True)

    @classmethod
    def packed(
        cls, segment: Tensor, mask: Tensor | None = None, last: tuple[Tensor, Tensor] | None = None
    ) -> Positions:
        """打包的文档：每个文档的位置从 0 重新开始。

        segment (B, T)：沿行不减的文档号；last：缓存里各行最后一个词元的 (pos, segment)，
        各为 (B, 1)，同一文档跨块时接着数。
        """
        real = torch.ones_like(segment, dtype=torch.bool) if mask is None else mask != 0
        floor = torch.iinfo(torch.int64).min
        before = torch.full_like(segment[:, :1], floor) if last is None else last[1]
        # 填充沿用它之前的文档号，于是不会被当成文档的边界。
        filled = torch.cat([before, segment.masked_fill(~real, floor)], 1).cummax(1).values
        starts = filled[:, 1:] != filled[:, :-1]
        count = real.long().cumsum(1) - 1
        # 最近一个文档开头处的计数；开头之前（接着缓存里的文档）则从 last 的位置往后数。
        carried = torch.zeros_like(count[:, :1]) if last is None else -(last[0] + 1)
        base = torch.where(starts, count, floor).cummax(1).values
        base = torch.where(base == floor, carried, base)
        return cls((count - base).masked_fill(~real, PADDING), segment=segment, dense=True)

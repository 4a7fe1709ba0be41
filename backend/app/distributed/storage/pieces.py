"""一个整个的张量由哪几块拼成，各块在哪个 rank 手里：写文件与读文件都照这张图。

普通的张量是一块，由第一个 rank 拿出；FSDP2 的是连着的几行；张量并行的（横切、竖切、按 q、k、v
各切）由各自的布局给出几块。块总是行的一段乘列的一段，其余各维整个。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sharding.rows import is_sharded, local, rows_of


@dataclass(frozen=True)
class Box:
    """整个张量的 [row, row + rows) 行、[column, column + columns) 列，在手里的第 at 行起。

    Attributes:
        columns: 0 = 所有的列（一维的也是）。
        at, left: 这一块在手里那份的哪里：第几行起，第几列起。
    """

    row: int
    rows: int
    at: int = 0
    column: int = 0
    columns: int = 0
    left: int = 0


@dataclass(frozen=True)
class Part:
    """一个整个的张量在这里的那些块。

    Attributes:
        held: 手里的张量；写时从这里取，读时写进这里。
        boxes: 由我拿出的块；别的 rank 有同样的一份时只有一个 rank 拿出，其余为空。
        wanted: 我要读的块。
    """

    held: Tensor
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    wanted: tuple[Box, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def view(self, box: Box, begin: int, end: int) -> Tensor:
        """块里整个张量的第 [begin, end) 行，是手里那份的视图 (行, 列, ...)。"""
        held = self.held if self.held.ndim else self.held[None]
        rows = held[box.at + begin - box.row : box.at + end - box.row]
        return rows[:, box.left : box.left + box.columns] if box.columns else rows


def part_of(x: Tensor, *, first: bool, copies: bool = True) -> Part:
    """普通的张量，或 FSDP2 的 DTensor。

    Args:
        first: 我是拿出普通张量的那个 rank（全部的里第一个）。
        copies: 我在拿出分片的那一份副本里（HSDP 的第一份）。
    """
    rows, mine = rows_of(x), local(x.detach())
    box = (Box(rows.first, rows.number),) if rows.number else ()
    gives = copies if is_sharded(x) else first
    return Part(mine, tuple(x.shape), box if gives else (), box)


def inside(boxes: tuple[Box, ...], begin: int, end: int) -> list[tuple[Box, int, int]]:
    """落在整个张量第 [begin, end) 行里的各块与其中的行。"""
    found = [(box, max(begin, box.row), min(end, box.row + box.rows)) for box in boxes]
    return [(box, low, high) for box, low, high in found if low < high]

"""分片上的 Muon：每个矩阵聚到一个主人那里正交化，再把结果的各行送回去。

正交化要整个矩阵，一个 rank 只有几行；而在 DTensor 上照单进程的写法做，split 给出的是副本，
更新什么也没改，也不报错（Moonlight #27、Megatron #5961 即此）。
每个矩阵只有一个 rank 去算；共搬 2·(W-1)/W 份参数，与一次 all_reduce 相当。
W 一组里的 rank 数，M 矩阵的个数。
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..comm import Ranks
from .rows import chunk_rows


class Owners:
    """M 个按行切开的矩阵各归哪个 rank 算。

    Args:
        shapes: 各矩阵整个的形状，各 rank 相同。
    """

    def __init__(self, shapes: Sequence[torch.Size], ranks: Ranks) -> None:
        self._shapes, self._ranks = shapes, ranks
        self._owner = _balanced([shape.numel() for shape in shapes], ranks.size)

    def gather(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """各矩阵在我手里的几行 -> {第几个: 归我算的整个矩阵}。"""
        out = [[parts[i].reshape(-1) for i in self._of(rank)] for rank in range(self._ranks.size)]
        mine = self._of(self._ranks.rank)
        sizes = [[self._numel(i, rank) for i in mine] for rank in range(self._ranks.size)]
        came = self._move(out, [sum(each) for each in sizes], like=parts)
        pieces = [part.split(each) for part, each in zip(came, sizes, strict=True)]
        return {
            i: torch.cat([piece[k] for piece in pieces]).view(self._shapes[i])
            for k, i in enumerate(mine)
        }

    def scatter(self, wholes: dict[int, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """{第几个: 归我算的整个矩阵} -> 各矩阵在我手里的几行。"""
        size, rank = self._ranks.size, self._ranks.rank
        out = [[self._rows(whole, i, to) for i, whole in wholes.items()] for to in range(size)]
        sizes = [[self._numel(i, rank) for i in self._of(owner)] for owner in range(size)]
        came = self._move(out, [sum(each) for each in sizes], like=like)
        found: dict[int, Tensor] = {}
        for owner, (part, each) in enumerate(zip(came, sizes, strict=True)):
            found |= dict(zip(self._of(owner), part.split(each), strict=True))
        return [found[i].view(like[i].shape) for i in range(len(like))]

    def _of(self, rank: int) -> list[int]:
        return [i for i, owner in enumerate(self._owner) if owner == rank]

    def _numel(self, i: int, rank: int) -> int:
        shape = self._shapes[i]
        return chunk_rows(shape[0], rank, self._ranks.size).number * (shape.numel() // shape[0])

    def _rows(self, whole: Tensor, i: int, rank: int) -> Tensor:
        rows = chunk_rows(self._shapes[i][0], rank, self._ranks.size)
        return whole[rows.first : rows.first + rows.number].reshape(-1)

    def _move(
        self, out: list[list[Tensor]], receive: list[int], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """给 rank j 第 j 串；收来的按 rank 分好。"""
        flat = [torch.cat(each) if each else like[0].new_empty(0) for each in out]
        send = [len(each) for each in flat]
        return list(self._ranks.exchange_rows(torch.cat(flat), send, receive).split(receive))


def rows_inside(parts: Sequence[int], first: int, count: int) -> list[tuple[int, int, int]]:
    """[(第几部分, 手里从第几行, 到第几行)]：拼成的矩阵的各部分落在手里这几行的哪里。

    Args:
        parts: 各部分的行数。
        first, count: 手里的是整个矩阵的第 [first, first + count) 行。
    """
    edges = [0]
    for rows in parts:
        edges.append(edges[-1] + rows)
    cuts = [
        (i, max(begin, first) - first, min(end, first + count) - first)
        for i, (begin, end) in enumerate(pairwise(edges))
    ]
    return [cut for cut in cuts if cut[1] < cut[2]]


def _balanced(sizes: Sequence[int], size: int) -> list[int]:
    """从大到小，各交给此刻最轻的 rank。"""
    load, owner = [0] * size, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner[i] = load.index(min(load))
        load[owner[i]] += sizes[i]
    return owner

"""每一轮里哪些例子同在一行、各行的次序：只由 (长度, seed, 轮次) 决定。

装箱用最佳适配递减（Johnson 1974：不超过最优的 11/9 加一行），对比见 decisions/027。各轮的行数
因此相同，而同样长的例子每轮换位置。

形状：N 例数，R 每轮行数，C 一行的容量。
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from app.data.sampler import mix

_MASK = (1 << 64) - 1


class Plan(Protocol):
    """一轮的行；place 是行在这一轮里的次序。"""

    @property
    def rows(self) -> int: ...

    def examples(self, epoch: int, place: int) -> np.ndarray:
        """这一行里有哪几例，按次序。"""


class OneEach:
    """一例一行，每轮重洗。ids: (N,)。"""

    def __init__(self, ids: np.ndarray, seed: int) -> None:
        self._ids, self._seed = ids, seed
        self._made = -1

    @property
    def rows(self) -> int:
        return len(self._ids)

    def examples(self, epoch: int, place: int) -> np.ndarray:
        # 只为快：记着这一轮的次序，忘了再算一遍也是同样的
        if self._made != epoch:
            self._order, self._made = shuffled(len(self._ids), self._seed, epoch), epoch
        return self._ids[self._order[place : place + 1]]


class Packed:
    """一行装几个完整的例子。ids, lengths: (N,)，每个长度不超过 capacity。"""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray, capacity: int, seed: int) -> None:
        self._ids, self._lengths, self._seed = ids, lengths, seed
        row_of = best_fit(-np.sort(-lengths), capacity)
        self._by_row = np.argsort(row_of, kind="stable")
        self._ends = np.cumsum(np.bincount(row_of))
        self._made = -1

    @property
    def rows(self) -> int:
        return len(self._ends)

    def examples(self, epoch: int, place: int) -> np.ndarray:
        if self._made != epoch:
            self._held, self._order = self._epoch(epoch)
            self._made = epoch
        row = self._order[place]
        first = self._ends[row - 1] if row else 0
        return self._held[first : self._ends[row]]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(各行的例子相接, 行的次序)；先打乱再按长度稳定排序，同样长的就换了位置。"""
        mixed = shuffled(len(self._ids), self._seed, 2 * epoch)
        by_length = mixed[np.argsort(-self._lengths[mixed], kind="stable")]
        return self._ids[by_length[self._by_row]], shuffled(self.rows, self._seed, 2 * epoch + 1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """每例放进哪一行：(N,)。lengths 从长到短；放进还装得下它的行里余地最小的，没有就另起一行。

    余地为 r 的行记在 waiting[r]，整数 there 的第 r 位说那里有没有，找最小的只要一次移位。
    """
    result = np.empty(len(lengths), dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    there = count = 0
    for i, length in enumerate(lengths.tolist()):
        fitting = there >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = waiting[room].pop()
            if not waiting[room]:
                there ^= 1 << room
        else:
            row, room, count = count, capacity, count + 1
        result[i] = row
        waiting[room - length].append(row)
        there |= 1 << (room - length)
    return result


def shuffled(n: int, seed: int, turn: int) -> np.ndarray:
    """0 … n-1 的一种次序；mix 是双射，所以没有并列，也不随 NumPy 的版本变。"""
    key = mix(mix(np.array([seed & _MASK], dtype=np.uint64)) ^ np.uint64(turn))
    return np.argsort(mix(np.arange(n, dtype=np.uint64) ^ key), kind="stable")

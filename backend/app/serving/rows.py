"""缓存的各行里是什么、谁在用；新来的提示借哪一行的前缀。

不用前缀树，也不用块的哈希：至多 64 行，整张表比一遍不到 0.1 ms，而且按词元精确
（块哈希的碰撞是安全漏洞，GHSA-rm76-4mrf-v9r8）。写完的行留着不清，最久没有用的先让出。
S 行数、C 上下文长度。
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.models.transformer.cache.row_cache import RowCache

# 短于这么多的前缀，抄与算差不多。
_WORTH = 8


class Rows:
    """S 行的账。held (S, C) 各行缓存里的词元号；space 各行属于哪个名字空间。"""

    def __init__(self, cache: RowCache, context: int) -> None:
        self.cache = cache
        self.held = np.full((cache.rows, context), -1, dtype=np.int32)
        self.busy: set[int] = set()
        self._space = [""] * cache.rows
        self._used = [0] * cache.rows
        self._clock = 0

    @property
    def free(self) -> int:
        return self.cache.rows - len(self.busy)

    def take(self, prompt: Sequence[int], space: str, share: bool) -> tuple[int, int]:
        """占一行，内容是 prompt 的一个前缀：(行, 借来的词元数)。要有空行。

        至多借到倒数第二个：最后一个词元要算，才有下一个的 logits。
        """
        best, length = self._longest(prompt, space) if share else (None, 0)
        row = self._choose(best, length)
        if row == best:
            self.cache.truncate(row, length)
        else:
            self.cache.reset(row)
            if best is not None and length >= _WORTH:
                self.cache.copy_prefix(best, row, length)
                self.held[row, :length] = self.held[best, :length]
        self.busy.add(row)
        self._space[row] = space
        return row, self.cache.lengths[row]

    def wrote(self, row: int, ids: Sequence[int]) -> None:
        """这些词元刚进了缓存。"""
        end = self.cache.lengths[row]
        self.held[row, end - len(ids) : end] = ids

    def give_back(self, row: int, poisoned: bool = False) -> None:
        """让出一行；内容留着给后来的人，除非坏了。"""
        self.busy.discard(row)
        self._clock += 1
        self._used[row] = self._clock
        if poisoned:
            self.cache.reset(row, poisoned=True)

    def _longest(self, prompt: Sequence[int], space: str) -> tuple[int | None, int]:
        ids = np.array(prompt[:-1], dtype=np.int32)
        same = (self.held[:, : len(ids)] == ids).cumprod(1).sum(1)
        best, length = None, 0
        for row, lcp in enumerate(np.minimum(same, self.cache.lengths).tolist()):
            if lcp > length and self._space[row] == space and self.cache.keeps(row, lcp):
                best, length = row, lcp
        return best, length

    def _choose(self, best: int | None, length: int) -> int:
        """借得一半以上就在原处接着写；否则空的（下标小的先，行才挨着），再最久没有用的。"""
        lengths = self.cache.lengths
        if best is not None and best not in self.busy and 2 * length >= lengths[best]:
            return best
        idle = [row for row in range(self.cache.rows) if row not in self.busy]
        return min(idle, key=lambda row: (lengths[row] > 0, self._used[row], row))

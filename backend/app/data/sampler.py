"""取样器：一个批次是 (seed, 读过的窗口数) 的纯函数，续训只需要一个整数。

批大小不变时，读过的窗口数就是 step·B；中途换过批大小的训练由 `moved` 接着读，不重不漏。

一轮里每个窗口恰好一次，次序由带密钥的伪随机置换给出：a·b 上的 Feistel 网络加循环行走
（Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"），内存 O(1)，第十亿步与
第一步一样快。每轮另有随机起点，使窗口的边界轮轮不同。

形状：B 批大小，T 上下文长度。
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

_MASK = (1 << 64) - 1
# 8 轮时五个窗口的 120 种次序还不均匀（测试里有卡方检验）
_ROUNDS = 12
_OFFSET_TAG, _ROUND_TAG = 1, 2


class _Readable(Protocol):
    @property
    def n_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...


class Sampler:
    """把 n_tokens 个词元分成长 context 的窗口（各多看一个词元作目标）。

    每轮 n_windows 个窗口；词元数不是整倍数时，多出的词元随每轮的起点轮换。

    Args:
        origin: 第 0 步若也用此刻的批大小，它之前读过的窗口数；换过批大小之后可以是负的。

    Raises:
        ValueError: 数据不足 context + 1 个词元，或参数不是正数。
    """

    def __init__(
        self, n_tokens: int, context: int, batch_size: int, seed: int, origin: int = 0
    ) -> None:
        if context < 1 or batch_size < 1:
            raise ValueError(f"context={context} and batch_size={batch_size} must be at least 1")
        if n_tokens < context + 1:
            raise ValueError(
                f"the data has {n_tokens} tokens, but context={context} needs at least "
                f"{context + 1}: use more text or a context of at most {max(n_tokens - 1, 1)}"
            )
        self.n_tokens, self.context, self.batch_size = n_tokens, context, batch_size
        self._seed, self._origin = seed, origin
        # 留出不到两个窗口的余量给每轮的随机起点；只有一个窗口时全部余量都给它。
        self.n_windows = max(1, (n_tokens - context) // context)
        self._slack = n_tokens - 1 - self.n_windows * context
        # a·b 只比窗口数多不到 a：几乎不用再走
        self._a = math.isqrt(self.n_windows - 1) + 1
        self._b = -(-self.n_windows // self._a)
        self._key = mix(np.array([seed & _MASK], dtype=np.uint64))

    def moved(self, step: int, windows: int) -> Sampler:
        """同样的次序，但做完 step 步时已读过 windows 个窗口：从那里接着读。"""
        if windows < 0:
            raise ValueError(f"windows={windows} must not be negative")
        origin = windows - step * self.batch_size
        return Sampler(self.n_tokens, self.context, self.batch_size, self._seed, origin)

    def windows(self, step: int) -> int:
        """做完 step 步时读过的窗口数。"""
        return self._origin + step * self.batch_size

    def epoch(self, step: int) -> float:
        """到 step 为止读过数据的遍数。"""
        return self.windows(step) / self.n_windows

    def offsets(self, step: int) -> np.ndarray:
        """第 step 批各行窗口的起点：(B,) int64。"""
        first = self.windows(step)
        if step < 0 or first < 0:
            raise ValueError(
                f"step={step} must not be negative"
                if step < 0
                else f"step={step} comes before the place where this sampler goes on"
            )
        samples = np.arange(first, first + self.batch_size, dtype=np.uint64)
        epochs, places = np.divmod(samples, np.uint64(self.n_windows))
        moved = self._hash(epochs, _OFFSET_TAG) % np.uint64(self._slack + 1)
        windows = self._permute(places, epochs)
        return (moved + windows * np.uint64(self.context)).astype(np.int64)

    def batch(
        self, dataset: _Readable, step: int, rows: slice | np.ndarray = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """(输入, 目标)，各 (B, T) int64，目标是输入左移一位；rows 取其中几行（或点名哪几行）。

        任何行的划分（微批、多卡）读到的都是同一批词元。
        """
        if dataset.n_tokens != self.n_tokens:
            raise ValueError(
                f"the dataset has {dataset.n_tokens} tokens, "
                f"but the sampler was made for {self.n_tokens}"
            )
        starts = self.offsets(step)[rows]
        length = self.context + 1
        tokens = np.empty((len(starts), length), dtype=np.int64)
        for row, start in enumerate(starts):
            tokens[row] = dataset.read(int(start), length)
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    def _hash(self, values: np.ndarray, tag: int) -> np.ndarray:
        return mix(mix(values ^ self._key) + np.uint64(tag))

    def _permute(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """[0, n_windows) 上的置换，每轮一把钥匙；落在界外的再走一次，直到界内。"""
        result = places.copy()
        pending = np.arange(len(result))
        while len(pending):
            result[pending] = self._feistel(result[pending], epochs[pending])
            pending = pending[result[pending] >= self.n_windows]
        return result

    def _feistel(self, values: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = values // b, values % b
        for number in range(0, _ROUNDS, 2):
            left = (left + self._round(right, epochs, number, a)) % a
            right = (right + self._round(left, epochs, number + 1, b)) % b
        return left * b + right

    def _round(
        self, half: np.ndarray, epochs: np.ndarray, number: int, size: np.uint64
    ) -> np.ndarray:
        return mix(half ^ self._hash(epochs, _ROUND_TAG + number)) % size


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64 的终混（Steele et al. 2014）；uint64 的溢出是本意。"""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

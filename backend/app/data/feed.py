"""一步一批：一个批次是 (数据, seed, 读过的行数) 的纯函数，续训只需要一个整数。

形状：B 批大小，T 上下文长度。
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from app.data.batch import UNSCORED, Batch
from app.data.sampler import Sampler

Rows = slice | np.ndarray
ALL = slice(None)


class Feed(Protocol):
    """训练怎样读数据；行不够一批的，以不计分的行补足，形状从不变。"""

    @property
    def context(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def rows_in_epoch(self) -> int:
        """读一遍数据要几行。"""

    def batch(self, step: int, rows: Rows = ALL) -> Batch:
        """第 step 批（从 0 起），或其中几行；任何划分读到的都是同一批。"""

    def windows(self, step: int) -> int:
        """做完 step 步时读过几行，补足的不算。"""

    def epoch(self, step: int) -> float:
        """到 step 为止读过几遍。"""

    def steps_of(self, epochs: float) -> int:
        """从头读这么多遍要几步，零头进一。"""

    def moved(self, step: int, windows: int) -> Feed:
        """同样的次序，但做完 step 步时已读过 windows 行：从那里接着读。"""

    def places(self, step: int) -> list[int]:
        """第 step 批各行从哪里读，给日志；补足的行是 -1。"""


class Readable(Protocol):
    @property
    def n_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...

    def segments(self, start: int, length: int) -> np.ndarray: ...


class Windows:
    """文本切成窗口，次序见 Sampler。

    apart：文档互不相见，位置在每篇开头从 0 起，跨篇的目标不计分。
    """

    def __init__(self, dataset: Readable, sampler: Sampler, apart: bool = False) -> None:
        self._dataset, self._sampler, self._apart = dataset, sampler, apart

    @property
    def context(self) -> int:
        return self._sampler.context

    @property
    def batch_size(self) -> int:
        return self._sampler.batch_size

    @property
    def rows_in_epoch(self) -> int:
        return self._sampler.n_windows

    def batch(self, step: int, rows: Rows = ALL) -> Batch:
        inputs, targets = self._sampler.batch(self._dataset, step, rows)
        if not self._apart:
            return Batch(inputs, targets)
        starts = self._sampler.offsets(step)[rows]
        whole = np.stack([self._dataset.segments(int(s), self.context + 1) for s in starts])
        segments = whole[:, :-1] - whole[:, :1]
        targets[whole[:, 1:] != whole[:, :-1]] = UNSCORED
        return Batch(inputs, targets, segments, restarting(segments))

    def windows(self, step: int) -> int:
        return self._sampler.windows(step)

    def epoch(self, step: int) -> float:
        return self._sampler.epoch(step)

    def steps_of(self, epochs: float) -> int:
        return math.ceil(epochs * self.rows_in_epoch / self.batch_size)

    def moved(self, step: int, windows: int) -> Windows:
        return Windows(self._dataset, self._sampler.moved(step, windows), self._apart)

    def places(self, step: int) -> list[int]:
        return [int(start) for start in self._sampler.offsets(step)]


def restarting(segments: np.ndarray) -> np.ndarray:
    """每例从 0 起的位置：(B, T)，segments 行内不减。"""
    places = np.arange(segments.shape[1])
    fresh = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return places - np.maximum.accumulate(np.where(fresh, places, 0), axis=1)

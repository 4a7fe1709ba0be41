"""文本切成窗口：今天的取样器，外加文档分开。

形状：B 批大小，T 上下文长度。
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from app.data.batch import ALL, UNSCORED, Batch, Rows, restarting
from app.data.sampler import Sampler


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

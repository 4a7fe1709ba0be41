"""完整的例子排成行：一例一行、几例一行、或成对（偏好），一行里的各例互不相见。

长 n 的一例占 n-1 处：输入少最后一个词元，目标少第一个，所以没有一个目标跨例。

形状：B 批大小，T 上下文长度，N 例数。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from app.data.batch import ALL, UNSCORED, Batch, Rows, restarting
from app.data.feeding.plan import Plan
from app.data.feeding.timeline import Timeline


class Source(Protocol):
    @property
    def document_starts(self) -> np.ndarray: ...

    @property
    def n_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...

    def scored(self, start: int, length: int) -> np.ndarray: ...


class Examples:
    """数据里的各例；answers：只有回答计分，否则每个目标都计分。"""

    def __init__(self, data: Source, answers: bool) -> None:
        self._data, self._answers = data, answers
        self.starts = np.asarray(data.document_starts)
        self.lengths = np.diff(self.starts, append=data.n_tokens)

    def read(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """(输入, 目标)，各 (n-1,)。"""
        start, length = int(self.starts[example]), int(self.lengths[example])
        ids = self._data.read(start, length)
        targets = ids[1:]
        if self._answers:
            targets = np.where(self._data.scored(start, length)[1:], targets, UNSCORED)
        return ids[:-1], targets


class Rowed:
    """按计划读的行：一例一行（Apart）或一行几例（Packed），只是计划不同。"""

    def __init__(self, examples: Examples, plan: Plan, context: int, timeline: Timeline) -> None:
        self._examples, self._plan, self._time = examples, plan, timeline
        self.context, self.batch_size = context, timeline.size
        self.rows_in_epoch = timeline.rows

    def windows(self, step: int) -> int:
        return self._time.at(step)

    def epoch(self, step: int) -> float:
        return self._time.at(step) / self._time.rows

    def steps_of(self, epochs: float) -> int:
        return self._time.steps_of(epochs)

    def moved(self, step: int, windows: int) -> Rowed:
        return Rowed(self._examples, self._plan, self.context, self._time.moved(step, windows))

    def batch(self, step: int, rows: Rows = ALL) -> Batch:
        which = np.arange(self.batch_size)[rows]
        return _filled(self._examples, _chosen(self._held(step), which), self.context)

    def places(self, step: int) -> list[int]:
        return _starts(self._examples, self._held(step), self.batch_size)

    def _held(self, step: int) -> list[np.ndarray]:
        """第 step 批各行的例子，补足的不在内。"""
        return [self._plan.examples(epoch, place) for epoch, place in self._time.read(step)]


class Pairs:
    """偏好：行 2i 是选中的，2i+1 是落选的；数据里也这样相邻。计划与时间都以对计。"""

    def __init__(
        self,
        examples: Examples,
        plan: Plan,
        context: int,
        timeline: Timeline,
        reference: np.ndarray | None = None,
    ) -> None:
        self._examples, self._plan, self._time = examples, plan, timeline
        self._reference = reference
        self.context, self.batch_size = context, 2 * timeline.size
        self.rows_in_epoch = 2 * timeline.rows

    def with_reference(self, reference: np.ndarray) -> Pairs:
        """另带参考模型给各例的对数概率：(N,)，按数据里的次序。

        Raises:
            ValueError: 长度不是例数。
        """
        if reference.shape != self._examples.lengths.shape:
            raise ValueError(
                f"reference has shape {reference.shape}, but the data has "
                f"{len(self._examples.lengths)} examples: compute it again for this data"
            )
        return Pairs(self._examples, self._plan, self.context, self._time, reference)

    @property
    def lengths(self) -> np.ndarray:
        """各例的长度：(N,)。"""
        return self._examples.lengths

    @property
    def readable(self) -> np.ndarray:
        """放得进一行的例，按数据里的次序。"""
        return np.flatnonzero((self.lengths >= 2) & (self.lengths <= self.context + 1))

    def one_each(self, examples: np.ndarray) -> Batch:
        """这几例，一例一行。"""
        return _filled(
            self._examples, [examples[i : i + 1] for i in range(len(examples))], self.context
        )

    def windows(self, step: int) -> int:
        return 2 * self._time.at(step)

    def epoch(self, step: int) -> float:
        return self._time.at(step) / self._time.rows

    def steps_of(self, epochs: float) -> int:
        return self._time.steps_of(epochs)

    def moved(self, step: int, windows: int) -> Pairs:
        if windows % 2:
            raise ValueError(f"windows={windows} is odd, but preference data is read in pairs")
        time = self._time.moved(step, windows // 2)
        return Pairs(self._examples, self._plan, self.context, time, self._reference)

    def batch(self, step: int, rows: Rows = ALL) -> Batch:
        held = self._held(step)
        which = np.arange(self.batch_size)[rows]
        batch = _filled(self._examples, _chosen(held, which), self.context)
        if self._reference is None:
            return batch
        known = np.zeros(self.batch_size)
        known[: len(held)] = self._reference[np.array([int(e[0]) for e in held])]
        return replace(batch, reference=known[which])

    def places(self, step: int) -> list[int]:
        return _starts(self._examples, self._held(step), self.batch_size)

    def _held(self, step: int) -> list[np.ndarray]:
        pairs = [self._plan.examples(epoch, place) for epoch, place in self._time.read(step)]
        return [2 * pair + side for pair in pairs for side in (0, 1)]


def _chosen(held: list[np.ndarray], which: np.ndarray) -> list[np.ndarray]:
    empty = np.empty(0, dtype=np.int64)
    return [held[i] if i < len(held) else empty for i in which.tolist()]


def _filled(examples: Examples, held: Sequence[np.ndarray], context: int) -> Batch:
    """各行放上它的例子；没有例子的行整行是补齐。"""
    inputs = np.zeros((len(held), context), dtype=np.int64)
    targets = np.full_like(inputs, UNSCORED)
    segments = np.zeros_like(inputs)
    mask = np.zeros(inputs.shape, dtype=bool)
    for row, inside in enumerate(held):
        place = 0
        for number, example in enumerate(inside.tolist()):
            ids, wanted = examples.read(example)
            end = place + len(ids)
            inputs[row, place:end], targets[row, place:end] = ids, wanted
            # 其后全属下一例；没有下一例，就是补齐的那一段
            segments[row, end:] = number + 1
            place = end
        mask[row, :place] = True
    padding = None if mask.all() else mask
    return Batch(inputs, targets, segments, restarting(segments), mask=padding)


def _starts(examples: Examples, held: list[np.ndarray], rows: int) -> list[int]:
    known = [int(examples.starts[inside[0]]) for inside in held]
    return known + [-1] * (rows - len(known))

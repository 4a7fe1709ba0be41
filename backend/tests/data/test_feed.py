"""供给：与取样器逐位相同；文档分开时谁也看不见谁、位置重新数、跨篇的目标不计分。"""

from __future__ import annotations

import numpy as np
import pytest

from app.data.batch import UNSCORED, Batch, restarting
from app.data.feed import Windows
from app.data.sampler import Sampler


class Numbers:
    """第 i 个词元是 i；文档在 starts 处开始。"""

    def __init__(self, n_tokens: int, starts: list[int]) -> None:
        self.n_tokens, self.starts = n_tokens, np.array(starts)

    def read(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length)

    def segments(self, start: int, length: int) -> np.ndarray:
        return np.searchsorted(self.starts, np.arange(start, start + length), side="right") - 1


DATA = Numbers(200, [0, 3, 4, 50, 51, 90, 170])


def windows(apart: bool, batch: int = 3) -> Windows:
    return Windows(DATA, Sampler(200, 16, batch, seed=1), apart)


def test_joined_windows_are_those_of_the_sampler() -> None:
    sampler, feed = Sampler(200, 16, 3, seed=1), windows(apart=False)
    for step in range(20):
        inputs, targets = sampler.batch(DATA, step)
        batch = feed.batch(step)
        assert np.array_equal(batch.inputs, inputs) and np.array_equal(batch.targets, targets)
        assert batch.segments is batch.positions is batch.reference is None
        assert feed.windows(step) == sampler.windows(step)
        assert feed.epoch(step) == sampler.epoch(step)
        assert feed.places(step) == sampler.offsets(step).tolist()
    later, other = feed.moved(5, 11), sampler.moved(5, 11)
    assert np.array_equal(later.batch(5).inputs, other.batch(DATA, 5)[0])
    assert feed.rows_in_epoch == sampler.n_windows == 11
    assert [feed.steps_of(e) for e in (0.1, 1, 1.5, 3)] == [1, 4, 6, 11]


def test_documents_apart() -> None:
    plain, feed = windows(apart=False), windows(apart=True)
    for step in range(12):
        batch, whole = feed.batch(step), plain.batch(step)
        assert np.array_equal(batch.inputs, whole.inputs)
        assert batch.segments is not None and batch.positions is not None
        for row in range(len(batch)):
            document = DATA.segments(int(batch.inputs[row, 0]), 17)
            for t in range(16):
                same = document[t] == document[t + 1]
                assert batch.targets[row, t] == (whole.targets[row, t] if same else UNSCORED)
                assert batch.segments[row, t] == document[t] - document[0]
                first = int(np.argmax(document == document[t]))
                assert batch.positions[row, t] == t - first


@pytest.mark.parametrize("rows", [slice(1, 3), np.array([2, 0])])
def test_rows_of_a_batch(rows: slice | np.ndarray) -> None:
    whole, part = windows(apart=True).batch(3), windows(apart=True).batch(3, rows)
    for name in ("inputs", "targets", "segments", "positions"):
        wanted = getattr(whole, name)[rows]
        assert np.array_equal(getattr(part, name), wanted)
        assert np.array_equal(getattr(whole.rows(rows), name), wanted)
    scored = Batch(whole.inputs, whole.targets, reference=np.arange(3.0)).rows(rows)
    assert len(scored) == 2 and scored.reference is not None
    assert np.array_equal(scored.reference, np.arange(3.0)[rows])


def test_positions_restart() -> None:
    segments = np.array([[0, 0, 0, 1, 1, 2], [5, 6, 6, 6, 9, 9]])
    assert restarting(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]

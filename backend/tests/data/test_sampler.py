"""取样器：每轮每个窗口恰好一次、任何划分读到同样的词元、第十亿步同样快、均匀。"""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.sampler import Sampler


class Counting:
    """第 i 个词元就是 i 的数据集。"""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= self.n_tokens
        return np.arange(start, start + length)


def epoch_of(sampler: Sampler, epoch: int) -> np.ndarray:
    """某一轮的全部窗口起点，按样本次序（batch_size=1 时一步一个）。"""
    assert sampler.batch_size == 1
    first = epoch * sampler.n_windows
    return np.concatenate([sampler.offsets(first + i) for i in range(sampler.n_windows)])


@settings(max_examples=60, deadline=None)
@given(
    context=st.integers(1, 40),
    extra=st.integers(1, 3000),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2),
)
def test_every_epoch_visits_each_window_once(
    context: int, extra: int, seed: int, epoch: int
) -> None:
    sampler = Sampler(context + extra, context, 1, seed)
    offsets = np.sort(epoch_of(sampler, epoch))
    assert (np.diff(offsets) == context).all()
    assert len(offsets) == sampler.n_windows
    assert offsets[0] >= 0 and offsets[-1] + context + 1 <= sampler.n_tokens
    # 每轮漏下的词元不到两个窗口
    assert sampler.n_tokens - 1 - len(offsets) * context < 2 * context


def test_epochs_differ_in_order_and_in_borders() -> None:
    sampler = Sampler(3_000, 16, 1, seed=3)
    epochs = [epoch_of(sampler, e) for e in range(10)]
    assert len({int(e.min()) % 16 for e in epochs}) > 5
    for a, b in itertools.combinations(epochs[:5], 2):
        order_a, order_b = np.argsort(a), np.argsort(b)
        assert (order_a == order_b).mean() < 0.05
    other = epoch_of(Sampler(3_000, 16, 1, seed=4), 0)
    assert not np.array_equal(other, epochs[0])


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 12),
    step=st.integers(0, 10**9),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_any_split_reads_the_same_tokens(batch: int, step: int, cuts: list[int], seed: int) -> None:
    data = Counting(997)
    sampler = Sampler(997, 8, batch, seed)
    inputs, targets = sampler.batch(data, step)
    assert inputs.shape == targets.shape == (batch, 8)
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, inputs + 1)
    assert np.array_equal(inputs[:, 0], sampler.offsets(step))
    borders = [0, *sorted(min(c, batch) for c in cuts), batch]
    parts = [
        sampler.batch(data, step, slice(a, b)) for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), inputs)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), targets)


def test_batch_size_regroups_the_same_sequence() -> None:
    """批大小只是分组：同一个种子下样本的次序不变，跨轮的批也一样。"""
    single = Sampler(500, 7, 1, seed=5)
    sequence = np.concatenate([single.offsets(i) for i in range(300)])
    for batch in (2, 7, 100):
        grouped = Sampler(500, 7, batch, seed=5)
        got = np.concatenate([grouped.offsets(i) for i in range(300 // batch)])
        assert np.array_equal(got, sequence[: len(got)])


def test_far_steps_cost_the_same_memory() -> None:
    """一万亿词元、第十亿步：不展开任何置换。"""
    sampler = Sampler(10**12, 1024, 64, seed=0)
    sampler.offsets(0)
    tracemalloc.start()
    offsets = sampler.offsets(10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert len(set(offsets.tolist())) == 64
    assert ((offsets >= 0) & (offsets < 10**12 - 1024)).all()


@pytest.mark.parametrize("windows", [2, 5, 8, 30])
def test_each_place_is_uniform_over_the_windows(windows: int) -> None:
    """许多轮里，一轮之中任一位置取到各窗口的次数：卡方在 5 个标准差之内。"""
    context, epochs = 4, 150 * windows
    sampler = Sampler((windows + 1) * context, context, windows, seed=11)
    assert sampler.n_windows == windows
    orders = np.array([np.argsort(np.argsort(sampler.offsets(e))) for e in range(epochs)])
    expected = epochs / windows
    for place in {0, windows // 2, windows - 1}:
        counts = np.bincount(orders[:, place], minlength=windows)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        free = windows - 1
        assert abs(chi2 - free) < 5 * np.sqrt(2 * free) + 5


@pytest.mark.slow
@pytest.mark.parametrize("windows", [2, 3, 4, 5])
def test_all_orders_of_few_windows_are_equally_likely(windows: int) -> None:
    epochs = 3000
    sampler = Sampler((windows + 1) * 4, 4, windows, seed=2)
    orders = [tuple(np.argsort(sampler.offsets(e)).tolist()) for e in range(epochs)]
    kinds = list(itertools.permutations(range(windows)))
    counts = np.array([orders.count(kind) for kind in kinds])
    expected = epochs / len(kinds)
    chi2, free = ((counts - expected) ** 2 / expected).sum(), len(kinds) - 1
    assert abs(chi2 - free) < 5 * np.sqrt(2 * free) + 5


def test_borders_are_uniform() -> None:
    context = 8
    sampler = Sampler(80, context, 1, seed=1)
    moved = [int(sampler.offsets(e * sampler.n_windows)[0]) % context for e in range(4000)]
    counts = np.bincount(moved, minlength=context)
    assert counts.min() > 350


def test_neighbouring_seeds_are_unrelated() -> None:
    firsts = [int(Sampler(100_000, 8, 1, seed=s).offsets(0)[0]) for s in range(500)]
    assert len(set(firsts)) > 480


@pytest.mark.parametrize(
    ("n_tokens", "context", "batch_size", "message"),
    [
        (8, 8, 1, "has 8 tokens, but context=8 needs at least 9"),
        (0, 1, 1, "has 0 tokens"),
        (100, 0, 1, "context=0"),
        (100, 1, 0, "batch_size=0"),
    ],
)
def test_bad_sizes_are_named(n_tokens: int, context: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(n_tokens, context, batch_size, seed=0)


def test_shortest_possible_data() -> None:
    inputs, targets = Sampler(9, 8, 3, seed=0).batch(Counting(9), 5)
    assert inputs.tolist() == [list(range(8))] * 3
    assert targets.tolist() == [list(range(1, 9))] * 3


def test_wrong_use_is_named() -> None:
    sampler = Sampler(100, 8, 2, seed=0)
    with pytest.raises(ValueError, match="101 tokens, but the sampler was made for 100"):
        sampler.batch(Counting(101), 0)
    with pytest.raises(ValueError, match="step=-1"):
        sampler.offsets(-1)

"""环形缓存与它的孪生逐位置相等：任意分块、填充、回滚、换行、失败的前向。"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.transformer.cache.slots import Layout
from app.models.transformer.cache.store import Scatter
from app.models.transformer.visibility.pattern import CAUSAL
from app.models.transformer.visibility.positions import PADDING, Positions

from ..twin import (
    BOUNDED,
    PATTERNS,
    UNPINNED,
    Twin,
    cache_for,
    full,
    garbage_is_nan,
    pads,
    suppress_refusal,
)

__all__ = ["garbage_is_nan"]
pytestmark = pytest.mark.usefixtures("garbage_is_nan")


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    max_chunk=st.integers(1, 9),
    padded=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_chunking_and_padding(
    sizes: list[int], max_chunk: int, padded: bool, seed: int
) -> None:
    rng = random.Random(seed)
    twin = Twin(PATTERNS, cache_for(PATTERNS, 2, max_chunk=max_chunk))
    for size in sizes:
        twin.feed(pads(rng, 2, size) if padded and rng.random() < 0.7 else full(2, size))


@settings(max_examples=30)
@given(max_chunk=st.integers(1, 6), padded=st.booleans(), seed=st.integers(0, 9999))
def test_rollbacks_reorders_and_failures(max_chunk: int, padded: bool, seed: int) -> None:
    """回滚只要在界内（自写到过的最远处算起 max_chunk 个）就精确，失败的前向不留痕迹。"""
    rng = random.Random(seed)
    twin = Twin(PATTERNS, cache_for(PATTERNS, 2, max_chunk=max_chunk))
    for _ in range(9):
        rows = len(twin.rows)
        size = rng.choice((1, 1, 1, 2, 3, max_chunk, max_chunk + 1, 20))
        real = pads(rng, rows, size) if padded and rng.random() < 0.5 else full(rows, size)
        chance = rng.random()
        if chance < 0.2:
            twin.feed(real, fail_at=rng.randint(1, len(PATTERNS)))
            if chance < 0.1:
                continue
        elif chance < 0.5:
            lengths = [max(0, len(row) - rng.randint(0, max_chunk)) for row in twin.rows]
            if not padded:
                lengths = [min(lengths)] * rows
            if all(n >= len(row) - max_chunk for n, row in zip(lengths, twin.rows, strict=True)):
                with suppress_refusal():
                    twin.truncate(lengths)
        elif chance < 0.65:
            twin.reorder([rng.randrange(rows) for _ in range(rng.randint(1, 3))])
            rows = len(twin.rows)
            real = pads(rng, rows, size) if padded else full(rows, size)
        twin.feed(real)


@pytest.mark.parametrize("max_chunk", [1, 2, 5])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_bound_on_rollback_is_tight(max_chunk: int, ragged: bool) -> None:
    """从写到的最远处退 max_chunk 个仍精确，再多一个就说清楚；没有绕回的环退多远都行。"""
    for back in range(max_chunk + 2):
        twin = Twin(BOUNDED, cache_for(BOUNDED, 2, max_chunk=max_chunk))
        twin.feed([[True] * 30, [not ragged] * 2 + [True] * 28])
        lengths = [30 - back, 28 - back] if ragged else [30 - back] * 2
        if back <= max_chunk:
            twin.truncate(lengths)
            for size in (1, max_chunk, max_chunk + 3):
                twin.feed(full(2, size))
            continue
        with pytest.raises(ValueError, match=rf"cannot truncate to {30 - back}.*max_chunk={back}"):
            twin.truncate(lengths)
        assert twin.cache.lengths.tolist() == [len(row) for row in twin.rows]
        twin.truncate([0, 0])
        twin.feed(full(2, 3))
        twin.truncate([2, 2])
        twin.feed(full(2, 40))


@settings(max_examples=20)
@given(
    borders=st.lists(st.integers(1, 29), max_size=5, unique=True),
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=6),
    max_chunk=st.integers(1, 5),
)
def test_packed_documents_in_a_ring(borders: list[int], sizes: list[int], max_chunk: int) -> None:
    twin, at = Twin(UNPINNED, cache_for(UNPINNED, 2, max_chunk=max_chunk)), 0
    document = [sum(border <= t for border in borders) for t in range(100)]
    for size in sizes:
        segment = torch.tensor([document[at : at + size]] * 2)
        twin.feed(full(2, size), Positions.packed(segment, None, twin.cache.last()))
        at += size
        if at > max_chunk and size == 3:
            at -= min(size, max_chunk)
            twin.truncate([at, at])


def test_last_sees_through_a_rollback() -> None:
    """窗口为 1 的环退满 max_chunk 之后，打包的文档仍接得上。"""
    patterns = ("local(1)",)
    twin = Twin(patterns, cache_for(patterns, 2, max_chunk=3))
    twin.feed(full(2, 9), Positions.packed(torch.zeros(2, 9, dtype=torch.long)))
    twin.truncate([6, 6])
    assert [x.flatten().tolist() for x in twin.cache.last()] == [[5, 5], [0, 0]]


def test_a_ring_holds_no_more_after_1000_tokens_than_after_50() -> None:
    cache = cache_for(("local(8)", "sinks(2, 6)"), 2, max_chunk=4)
    assert [keys.shape[2] for keys in cache.keys] == [8 + 4 - 1 + 1, 2 + 6 + 4 - 1 + 1]
    assert cache.max_len is None
    twin, held = Twin(("local(8)", "sinks(2, 6)"), cache), []
    for size in [10] * 5 + [1] * 50 + [100] * 9:
        twin.feed(full(2, size))
        held.append(cache.nbytes)
    assert set(held) == {held[0]} and cache.lengths.tolist() == [1000, 1000]


def test_single_tokens_far_beyond_the_ring() -> None:
    twin = Twin(BOUNDED, cache_for(BOUNDED, 1, max_chunk=3))
    for _ in range(60):
        twin.feed(full(1, 1))


def test_who_gets_a_ring() -> None:
    def slots(patterns: tuple[str, ...], **options) -> list[int]:
        return [keys.shape[2] - 1 for keys in cache_for(patterns, 1, **options).keys]

    assert slots(("local(256)", "causal")) == [256 + 32 - 1, 1000]
    assert slots(("local(256)", "causal"), max_len=100) == [100, 100]
    assert slots(("local(256)", "causal"), ring=False) == [1000, 1000]
    assert slots(("local(256, 2)",), max_chunk=1) == [511]
    assert cache_for(("local(8)",), 1).max_len is None
    assert cache_for(("local(8)",), 1, max_len=64).max_len == 64
    assert cache_for(("local(8)",), 1, position="learned").max_len == 1000
    assert cache_for(("local(8)", "causal"), 1).max_len == 1000


@pytest.mark.parametrize("padded", [False, True])
def test_marked_tokens_without_a_ring(padded: bool) -> None:
    """点名的全局词元永远可见，后来的块也看得见。"""
    patterns = ("longformer(2, 1)", "causal")
    twin = Twin(patterns, cache_for(patterns, 2, ring=False))
    for size in (5, 3, 1, 4, 1):
        real = full(2, size)
        if padded and size == 5:
            real[1][:2] = [False, False]
        where = twin.where(real)
        marked = torch.arange(size).expand(2, -1) == 2
        twin.feed(real, Positions(where.pos, start=where.start, marked=marked))
    assert any(t.marked for t in twin.rows[0])
    twin.feed(full(2, 2))
    # 点名的词元被回滚，它的槽给了没有点名的：点名不可留在槽里。
    twin.truncate([1, 1])
    twin.feed(full(2, 9))


def test_what_a_ring_cannot_keep_is_refused() -> None:
    sinks = cache_for(("sinks(2, 4)",), 1)
    zeros = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"pins the first 2 .*ring=False"):
        sinks.begin(Positions.packed(zeros))
    pos = torch.arange(3)[None]
    with pytest.raises(ValueError, match=r"marked as global.*ring=False"):
        sinks.begin(Positions(pos, start=0, marked=pos == 1))
    with pytest.raises(ValueError, match="max_chunk=0 must be at least 1"):
        cache_for(("local(4)",), 1, max_chunk=0)
    with pytest.raises(ValueError, match="kv_dtype='int4'"):
        cache_for(("local(4)",), 1, kv_dtype="int4")
    with pytest.raises(ValueError, match=r"layers with local\(4\), not causal"):
        cache_for(("local(4)",), 1).begin(Positions(pos)).keys(CAUSAL)


def test_own_positions_must_increase_in_a_ring() -> None:
    patterns = ("sinks(2, 4)", "local(3)")
    twin = Twin(patterns, cache_for(patterns, 1, max_chunk=2))
    twin.feed(full(1, 4), Positions(torch.tensor([[0, 2, 3, 7]])))
    twin.feed([[True, False, True]], Positions(torch.tensor([[8, PADDING, 11]])))
    for bad, text in (([11], "11 after position 11"), ([12, PADDING, 12], "12 after position 12")):
        with pytest.raises(ValueError, match=rf"row 0 has position {text}.*ring=False"):
            twin.cache.begin(Positions(torch.tensor([bad])))
    # 默认的位置从长度数起，比已有的小：同样说清。
    with pytest.raises(ValueError, match="position 6 after position 11"):
        twin.feed(full(1, 1))
    twin.feed(full(1, 1), Positions(torch.tensor([[30]])))
    free = cache_for(patterns, 1, ring=False)
    free.begin(Positions(torch.tensor([[5, 5, 2]])))


def test_a_window_holds_no_more_keys_at_token_100000_than_at_1000() -> None:
    cache = cache_for(("local(256)",), 1)
    held = []
    for size in (999, 1, 98_999, 1):
        step = cache.begin(Positions.plain(cache.uniform or 0, size, torch.device("cpu")))
        x = torch.zeros(1, 2, size, 8, dtype=torch.float64)
        keys, _ = step.write(0, x, x)
        cache.commit(step)
        if size == 1:
            held.append((cache.uniform, keys.shape[2], cache.nbytes))
    assert held == [(1000, 287, held[0][2]), (100_000, 287, held[0][2])]


@given(
    begin=st.integers(0, 60),
    size=st.integers(1, 60),
    pinned=st.integers(0, 4),
    ring=st.integers(2, 9),
)
def test_runs_write_each_slot_once(begin: int, size: int, pinned: int, ring: int) -> None:
    """切片的写法与逐个词元的槽号相同，写下的是最后到的那些，每槽一次。"""
    layout = Layout(pinned + ring, pinned, reach=2)
    n = torch.arange(begin, begin + size)
    wanted = dict(zip(layout.slot(n).tolist(), n.tolist(), strict=True))
    written: dict[int, int] = {}
    spans = layout.runs(begin, begin + size).spans
    for slots, columns in spans:
        for slot, number in zip(
            range(slots.start, slots.stop), n[columns or slice(None)].tolist(), strict=True
        ):
            assert slot not in written
            written[slot] = number
    assert written == wanted and len(spans) <= 3


@pytest.mark.parametrize("ragged", [False, True])
def test_a_failed_forward_counts_against_the_rollback(ragged: bool) -> None:
    """失败的前向已盖掉环里的旧槽：接着往下仍精确，往回则要从它写到的地方算起。"""
    patterns = ("local(5)", "sinks(1, 3)")
    for back in range(4):
        twin = Twin(patterns, cache_for(patterns, 2, max_chunk=3))
        twin.feed([[True] * 30, [not ragged] * 2 + [True] * 28])
        twin.feed(full(2, 2), fail_at=2)
        lengths = [len(row) - back for row in twin.rows]
        if back <= 1:
            twin.truncate(lengths)
        else:
            with pytest.raises(ValueError, match="written up to 32"):
                twin.truncate(lengths)
        twin.feed(full(2, 3))


@pytest.mark.parametrize("ragged", [False, True])
def test_a_ring_that_never_wrapped_rolls_back_anywhere(ragged: bool) -> None:
    for length in (8, 9):
        twin = Twin(("local(5)",), cache_for(("local(5)",), 2, max_chunk=4))
        twin.feed([[True] * length, [not ragged] + [True] * (length - 1)])
        if length == 8:
            twin.truncate([1, 1])
            twin.feed(full(2, 7))
        else:
            with pytest.raises(ValueError, match=r"cannot truncate to 1 .*written up to 9"):
                twin.truncate([1, 1])


def test_no_slot_is_written_twice() -> None:
    """同一槽写两次，加速器上谁留下没有保证（CPU 上恰好是后者，数值看不出来）。"""
    cache = cache_for(("sinks(2, 3)",), 2, max_chunk=2)
    capacity = 2 + 3 + 2 - 1
    for width in (3, 20, 2, 1):
        mask = torch.ones(2, width, dtype=torch.long)
        mask[1, 0] = 0
        step = cache.begin(Positions.padded(mask, cache.lengths[:, None]))
        where = step.access[0].where
        assert isinstance(where, Scatter)
        for row in where.slots.tolist():
            used = [slot for slot in row if slot != capacity]
            assert len(used) == len(set(used)) <= capacity
        x = torch.zeros(2, 2, width, 8, dtype=torch.float64)
        step.write(0, x, x)
        cache.commit(step)


@pytest.mark.parametrize("ragged", [False, True])
def test_rolling_back_into_the_pinned_prefix(ragged: bool) -> None:
    """退到钉住的前缀之内总可以，环等于没有写过；多留一个就要看环里已没有的键。"""
    for length in (2, 3):
        twin = Twin(("sinks(2, 4)",), cache_for(("sinks(2, 4)",), 2, max_chunk=2))
        twin.feed([[True] * 30, [not ragged] + [True] * 29])
        if length == 3:
            with pytest.raises(ValueError, match="cannot truncate to 3"):
                twin.truncate([3, 3])
            continue
        twin.truncate([2, 2])
        twin.feed(full(2, 5))
        twin.truncate([3, 3])
        twin.feed(full(2, 9))


def test_own_positions_restart_with_each_document_in_a_ring() -> None:
    twin = Twin(UNPINNED, cache_for(UNPINNED, 1, max_chunk=2))
    twin.feed(
        full(1, 5), Positions(torch.tensor([[0, 2, 3, 0, 1]]), torch.tensor([[0, 0, 0, 1, 1]]))
    )
    twin.feed(full(1, 3), Positions(torch.tensor([[4, 0, 5]]), torch.tensor([[1, 2, 2]])))
    with pytest.raises(ValueError, match="position 5 after position 5"):
        twin.cache.begin(Positions(torch.tensor([[5]]), torch.tensor([[2]])))

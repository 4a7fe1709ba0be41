"""完整的例子排成行：每个计分的词元每轮恰好一次、计划只由数据与种子决定、接续换得了批大小。"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.batch import UNSCORED, Batch
from app.data.chat.template import builtin
from app.data.feed import Feed, open_feed
from app.data.feeding.examples import Pairs
from app.data.feeding.plan import OneEach, Packed, best_fit
from app.data.feeding.timeline import Timeline
from app.data.shards import Kind, TokenDataset
from app.data.tokenizers import CharTokenizer
from app.data.writer import ExampleWriter

T = 12
# 每个词元各不相同，数得出谁被读过几次
TOKENIZER = CharTokenizer(chr(0x4E00 + i) for i in range(3000))
PLAIN = builtin("plain", TOKENIZER)


def dataset(folder: Path, lengths: list[int], kind: Kind = "chat", shard: int = 17) -> TokenDataset:
    """第 k 个词元的号是 k；每例前三分之一是问话，不计分。"""
    writer, first = ExampleWriter(folder, TOKENIZER, PLAIN, kind, shard), 0
    for length in lengths:
        tokens = np.arange(first, first + length, dtype=np.uint32)
        writer.add_example(tokens, np.arange(length) >= max(1, length // 3), n_bytes=3 * length)
        first += length
    writer.finish({"description": "test"})
    return TokenDataset.open(folder, "sha256")


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    return np.random.default_rng(0).integers(2, T + 2, 61).tolist()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> TokenDataset:
    return dataset(tmp_path_factory.mktemp("chat"), lengths)


def scored_of(data: TokenDataset) -> Counter[int]:
    """每例的第一个词元没有谁预测它，不算在内。"""
    marks = data.scored(0, data.n_tokens)
    marks[np.asarray(data.document_starts)] = False
    return Counter(np.flatnonzero(marks).tolist())


def seen(batches: list[Batch]) -> Counter[int]:
    flat = np.concatenate([b.targets[b.targets != UNSCORED] for b in batches])
    return Counter(flat.tolist())


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("cuts", range(1, 8))
def test_an_epoch_scores_every_token_once(chat: TokenDataset, pack: bool, cuts: int) -> None:
    feed = open_feed(chat, T, 7, seed=3, pack=pack)
    borders = np.linspace(0, 7, cuts + 1).astype(int)
    parts = [slice(a, b) for a, b in zip(borders, borders[1:], strict=False)]
    steps = feed.steps_of(1)
    for epoch in range(2):
        at = range(epoch * steps, (epoch + 1) * steps)
        assert seen([feed.batch(step, part) for step in at for part in parts]) == scored_of(chat)
    assert feed.windows(2 * steps) == 2 * feed.rows_in_epoch and feed.epoch(steps) == 1.0
    assert {feed.batch(step).inputs.shape for step in range(2 * steps)} == {(7, T)}


@pytest.mark.parametrize("pack", [False, True])
def test_rows_hold_whole_examples_that_do_not_touch(chat: TokenDataset, pack: bool) -> None:
    starts, feed = np.asarray(chat.document_starts), open_feed(chat, T, 4, seed=0, pack=pack)
    held = []
    for step in range(feed.steps_of(1)):
        batch, places = feed.batch(step), feed.places(step)
        assert batch.segments is not None and batch.positions is not None
        for row in range(4):
            segments = batch.segments[row]
            inside = [] if places[row] == -1 else np.unique(segments).tolist()
            assert places[row] == (batch.inputs[row, 0] if inside else -1)
            for segment in inside:
                at = np.flatnonzero(segments == segment)
                assert np.array_equal(batch.positions[row, at], np.arange(len(at)))
                first = int(batch.inputs[row, at[0]])
                if first in starts and (batch.targets[row, at] != UNSCORED).any():
                    held.append(first)
                    end = [*starts[1:], chat.n_tokens][list(starts).index(first)]
                    assert np.array_equal(batch.inputs[row, at], np.arange(first, end - 1))
                    wanted = np.arange(first + 1, end)
                    marks = chat.scored(first, end - first)[1:]
                    assert np.array_equal(batch.targets[row, at], np.where(marks, wanted, UNSCORED))
                else:  # 补齐的那一段
                    assert segment == segments[-1]
                    assert (batch.targets[row, at] == UNSCORED).all()
    assert sorted(held) == starts.tolist()


def test_score_all_scores_every_target(chat: TokenDataset, lengths: list[int]) -> None:
    feed = open_feed(chat, T, 5, seed=0, score="all", pack=True)
    total = seen([feed.batch(step) for step in range(feed.steps_of(1))])
    assert sum(total.values()) == sum(n - 1 for n in lengths) and set(total.values()) == {1}


@pytest.mark.parametrize("pack", [False, True])
def test_batches_are_a_function_of_the_step(chat: TokenDataset, pack: bool) -> None:
    """读的次序、进程里先前读过什么都不相干；跨轮也一样。"""
    plain = open_feed(chat, T, 5, seed=1, pack=pack)
    steps = 3 * plain.steps_of(1)
    wanted = [plain.batch(step) for step in range(steps)]
    other = open_feed(chat, T, 5, seed=1, pack=pack)
    for step in np.random.default_rng(0).permutation(steps).tolist():
        moved = plain.moved(step, plain.windows(step))
        for feed in (other, moved):
            batch = feed.batch(step)
            for name in ("inputs", "targets", "segments", "positions"):
                assert np.array_equal(getattr(batch, name), getattr(wanted[step], name))
        assert [moved.windows(s) for s in range(step, steps)] == [
            plain.windows(s) for s in range(step, steps)
        ]
    with pytest.raises(ValueError, match="step=3 comes before step 4"):
        plain.moved(4, 8).batch(3)


@pytest.mark.parametrize("pack", [False, True])
def test_another_batch_size_goes_on_at_the_same_row(chat: TokenDataset, pack: bool) -> None:
    small = open_feed(chat, T, 3, seed=2, pack=pack)
    large = open_feed(chat, T, 8, seed=2, pack=pack).moved(4, small.windows(4))
    batches = [small.batch(step) for step in range(4)]
    step = 4
    while large.windows(step) < large.rows_in_epoch:
        batches.append(large.batch(step))
        step += 1
    assert seen(batches) == scored_of(chat)
    assert large.windows(step) == large.rows_in_epoch


def test_epochs_and_seeds_differ(chat: TokenDataset) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        feed = open_feed(chat, T, 1, seed, pack=True)
        first = epoch * feed.rows_in_epoch
        return [int(feed.batch(first + i).inputs[0, 0]) for i in range(feed.rows_in_epoch)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(o) for o in orders}) == 3
    assert order(0, 1) == orders[1]


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), extra=st.integers(0, 30))
def test_best_fit_is_the_slow_one(lengths: list[int], extra: int) -> None:
    capacity = max(lengths) + extra
    ordered = sorted(lengths, reverse=True)
    room: list[int] = []
    rows = best_fit(np.array(ordered), capacity)
    for length, row in zip(ordered, rows.tolist(), strict=True):
        fits = [r for r in room if r >= length]
        if fits:
            assert room[row] == min(fits)
        else:
            assert row == len(room)
            room.append(capacity)
        room[row] -= length
    assert min(room) >= 0
    # 任何两行合不成一行
    lowest = sorted(capacity - r for r in room)[:2]
    assert len(room) == 1 or sum(lowest) > capacity


def test_packing_needs_few_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(200), 0.8, 5000).astype(int) + 1, 1024)
    plan = Packed(np.arange(5000), lengths, 1024, seed=0)
    assert lengths.sum() / (plan.rows * 1024) > 0.99
    assert OneEach(np.arange(5000), seed=0).rows == 5000


def test_preference_comes_in_pairs(tmp_path: Path) -> None:
    # 第三对有一边放不下，整对略去
    data = dataset(tmp_path, [5, 7, 4, 13, 20, 3, 9, 9, 2, 2], "preference")
    said: list[str] = []
    feed = open_feed(data, T, 4, seed=0, say=said.append)
    assert isinstance(feed, Pairs) and feed.rows_in_epoch == 8 and "1 of 10" in said[0]
    reference = -np.arange(10.0)
    starts = np.asarray(data.document_starts).tolist()
    known = Pairs.with_reference(feed, reference)
    met = []
    for step in range(feed.steps_of(1)):
        batch = known.batch(step)
        assert batch.reference is not None
        for row in (0, 2):
            one, two = (starts.index(int(batch.inputs[row + i, 0])) for i in (0, 1))
            assert two == one + 1 and one % 2 == 0
            assert batch.reference[row : row + 2].tolist() == [-one, -two]
            met.append(one)
    assert sorted(met) == [0, 2, 6, 8]
    assert feed.windows(1) == 4 and feed.moved(1, 4).batch(1).inputs.tolist() == (
        feed.batch(1).inputs.tolist()
    )
    with pytest.raises(ValueError, match=r"windows=3 is odd"):
        feed.moved(1, 3)
    with pytest.raises(ValueError, match=r"reference has shape \(9,\).*10 examples"):
        Pairs.with_reference(feed, np.zeros(9))


def test_a_timeline_counts_rows_not_fillers() -> None:
    time = Timeline(rows=10, size=4)
    assert [time.at(s) for s in range(7)] == [0, 4, 8, 10, 14, 18, 20]
    moved = time.moved(2, 8)
    assert [moved.at(s) for s in range(2, 7)] == [8, 10, 14, 18, 20]
    assert [Timeline(10, 3).moved(2, 8).at(s) for s in range(2, 8)] == [8, 10, 13, 16, 19, 20]
    assert [time.steps_of(e) for e in (0.3, 1, 1.5, 2)] == [1, 3, 5, 6]
    with pytest.raises(ValueError, match="windows=-1"):
        time.moved(0, -1)


TEXT_ANSWERS = "score=answers, but .* is plain text"


def test_options_that_do_not_fit_are_refused(tmp_path: Path, chat: TokenDataset) -> None:
    from tests.data.test_shards import write

    text = write(tmp_path / "text", [b"some plain text", b"and more of it"])
    with pytest.raises(ValueError, match=TEXT_ANSWERS):
        open_feed(text, 4, 2, 0, score="answers")
    with pytest.raises(ValueError, match=r"pack=true .* plain text: use documents=apart"):
        open_feed(text, 4, 2, 0, pack=True)
    pairs = dataset(tmp_path / "pairs", [5, 5], "preference")
    with pytest.raises(ValueError, match="batch_size=3 is odd"):
        open_feed(pairs, T, 3, 0)
    with pytest.raises(ValueError, match="leave pack=true and score=auto out"):
        open_feed(pairs, T, 2, 0, pack=True)
    with pytest.raises(ValueError, match="no example fits in context=3"):
        open_feed(dataset(tmp_path / "long", [9, 9]), 3, 2, 0)


def test_long_examples_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    data = dataset(tmp_path, [5] * 150 + [40])
    feed: Feed = open_feed(data, T, 2, 0, say=said.append)
    assert feed.rows_in_epoch == 150
    assert said[0].startswith(f"1 of 151 examples are longer than context={T}")
    said.clear()
    open_feed(dataset(tmp_path / "more", [5, 40]), T, 2, 0, say=said.append)
    assert said[0].startswith("warning: 1 of 2")

"""可见键的数目与文字图：与逐对数出来的比较。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.models.transformer.visibility import coverage as module
from app.models.transformer.visibility.coverage import as_text, coverage, seen
from app.models.transformer.visibility.pattern import CAUSAL, Pattern
from app.models.transformer.visibility.pattern_text import parse

from ..strategies import patterns


def by_hand(pattern: Pattern, length: int) -> list[list[bool]]:
    return [[k <= q and bool(pattern.allow(q, k)) for k in range(length)] for q in range(length)]


@given(patterns, st.integers(1, 24))
def test_every_number_and_both_pictures_are_those_of_the_pairs(
    pattern: Pattern, length: int
) -> None:
    rows = by_hand(pattern, length)
    assert seen(pattern, length).tolist() == rows
    counts = [sum(row) for row in rows]
    found = coverage(pattern, length)
    assert found.exact and found.length == length and found.most == max(counts)
    assert found.mean == pytest.approx(sum(counts) / length)
    assert found.share == pytest.approx(sum(counts) / (length * (length + 1) / 2))
    text = as_text(pattern, length).split("\n")
    assert [len(line) for line in text] == list(range(1, length + 1))
    assert [line.count("#") for line in text] == counts


def test_a_picture_in_letters() -> None:
    assert as_text(parse("local(2) | global(1)"), 4) == "#\n##\n###\n#.##"


@pytest.mark.parametrize("text", ["local(64) | global(4)", "strided(64)", "fixed(64, 8)"])
def test_a_sample_of_the_queries_is_near_the_whole(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """图样的周期 64 与抽查的间隔 16 成倍数：等距地抽会总抽到块里的同一列。"""
    pattern, length = parse(text), 4096
    whole = coverage(pattern, length)
    monkeypatch.setattr(module, "_PAIRS", length * 256)
    some = coverage(pattern, length)
    assert whole.exact and not some.exact
    assert some.mean == pytest.approx(whole.mean, rel=0.02)
    assert some.share == pytest.approx(whole.share, rel=0.02)
    assert some.most <= whole.most and some.most == pytest.approx(whole.most, rel=0.02)


def test_causal_needs_no_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rows", None)
    found = coverage(CAUSAL, 10_000_000)
    assert (found.mean, found.most, found.share) == (5_000_000.5, 10_000_000, 1.0)
    assert found.exact
    assert coverage(parse("local(32)"), 32).share == 1.0


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        coverage(CAUSAL, 0)


def test_queries_stay_inside_and_rise() -> None:
    for length in (8193, 100_000, 10_000_000):
        queries = module._queries(length)
        assert int(queries.min()) >= 0 and int(queries.max()) < length
        assert len(queries) >= 16 and bool((torch.diff(queries) >= 0).all())

"""丢掉中段：等于从来没有过中段的缓存，或说清为什么不行。"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.transformer import KVCache
from app.models.transformer.visibility.positions import Positions

from ..twin import Twin, cache_for, full, garbage_is_nan, pads, suppress_refusal, turn_back

__all__ = ["garbage_is_nan"]
pytestmark = pytest.mark.usefixtures("garbage_is_nan")


STREAMS = {
    "full": (("causal", "strided(2)"), {}),
    "rings": (("sinks(2, 4)", "sinks(2, 9)", "causal"), {"max_chunk": 3}),
    "no ring": (("sinks(2, 4)", "local(3)"), {"ring": False}),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("turning", [False, True])
@settings(max_examples=25)
@given(padded=st.booleans(), last=st.integers(1, 20), seed=st.integers(0, 9999))
def test_eviction_equals_a_cache_that_never_held_the_middle(
    name: str, turning: bool, padded: bool, last: int, seed: int
) -> None:
    """留下的键值不变，位置重新数：以后每一步都与只有这些词元的直接写法相同。"""
    rng = random.Random(seed)
    patterns, options = STREAMS[name]
    position = "rope" if turning else "none"
    cache = cache_for(patterns, 2, position=position, **options)
    twin = Twin(patterns, cache, turning=turning)
    for _ in range(6):
        width = rng.choice((1, 2, 5, 12, 30))
        twin.feed(pads(rng, 2, width) if padded else full(2, width))
        chance = rng.random()
        if chance < 0.6:
            twin.evict(2, last)
        elif chance < 0.8:
            lengths = [max(0, len(row) - rng.randint(0, 2)) for row in twin.rows]
            with suppress_refusal():
                twin.truncate(lengths if padded else [min(lengths)] * 2)
        twin.feed(full(2, 1))


@pytest.mark.slow
@given(
    first=st.integers(0, 7),
    last=st.integers(1, 9),
    back=st.integers(0, 4),
    length=st.sampled_from([8, 9, 10, 30]),
    padded=...,
    turning=...,
)
@settings(max_examples=40)
def test_eviction_from_rings_is_exact_or_refused(
    first: int, last: int, back: int, length: int, padded: bool, turning: bool
) -> None:
    """前缀与钉住的不一样长时，要么仍然精确，要么说清；被拒绝的不改动任何东西。"""
    patterns = ("sinks(3, 4)", "local(5)", "local(2)")
    position = "rope" if turning else "none"
    cache = cache_for(patterns, 2, max_chunk=4, position=position)
    twin = Twin(patterns, cache, turning=turning)
    twin.feed([[True] * length, [not padded] * 3 + [True] * (length - 3)])
    with suppress_refusal():
        twin.evict(first, last)
    for size in (1, 3, 9):
        with suppress_refusal():
            twin.truncate([max(1, len(row) - back) for row in twin.rows])
        twin.feed(full(2, size))


def test_eviction_refuses_what_it_cannot_renumber() -> None:
    def fed(positions: Positions, pattern: str = "causal", **options) -> KVCache:
        cache = cache_for((pattern,), 1, **options)
        step = cache.begin(positions)
        x = torch.zeros(1, 2, positions.length, 8, dtype=torch.float64)
        step.write(0, x, x)
        cache.commit(step)
        return cache

    pos = torch.arange(6)[None]
    plain = Positions.plain(0, 6, pos.device)
    for cache, text in (
        (fed(plain, position="learned"), "position='learned'"),
        (fed(plain, position="rope"), "position='rope' and rerotate=None"),
        (fed(Positions.packed(pos // 3)), "packed documents"),
        (fed(Positions(pos, start=0, marked=pos == 1)), "marked tokens"),
        (fed(Positions(pos * 2)), "given by hand"),
    ):
        with pytest.raises(ValueError, match=text):
            cache.evict(1, 2)
        assert cache.lengths.tolist() == [6]
    with pytest.raises(ValueError, match="position='none' and rerotate"):
        fed(plain).evict(1, 2, turn_back)
    with pytest.raises(ValueError, match="keep_last=0 at least 1"):
        fed(plain).evict(1, 0)
    with pytest.raises(ValueError, match="keep_first=-1"):
        fed(plain).evict(-1, 1)
    many = Positions.plain(0, 60, pos.device)
    # 头一种要看第 3、4 个，第二种要看倒数第 7、6 个，环里都已没有。
    for keep in ((4, 2), (0, 7)):
        with pytest.raises(ValueError, match=r"ring of 7 slots .*use keep_first=2"):
            fed(many, "sinks(2, 4)", max_chunk=2).evict(*keep)
    assert fed(plain).evict(2, 4) == 0 and fed(plain).evict(1, 2) == 3


@pytest.mark.parametrize("padded", [False, True])
def test_rollback_after_eviction_goes_as_far_as_before(padded: bool) -> None:
    patterns = ("sinks(2, 4)", "causal")
    twin = Twin(patterns, cache_for(patterns, 2, max_chunk=3))
    twin.feed([[True] * 40, [not padded] * 3 + [True] * 37])
    twin.evict(2, 9)
    twin.truncate([8, 9 if padded else 8])
    twin.feed(full(2, 1))
    with pytest.raises(ValueError, match="written up to 11"):
        twin.truncate([7, 7])


def test_eviction_that_loses_the_start_forbids_rolling_back_to_it() -> None:
    patterns = ("local(5)",)
    twin = Twin(patterns, cache_for(patterns, 1, max_chunk=4))
    twin.feed(full(1, 30))
    twin.evict(6, 4)
    twin.feed(full(1, 1))
    with pytest.raises(ValueError, match="cannot truncate to 8"):
        twin.truncate([8])
    twin.feed(full(1, 20))

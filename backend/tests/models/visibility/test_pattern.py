"""图样代数：手算的计数，与定义逐格相同，上界、子句、盲查询对暴力枚举。"""

from __future__ import annotations

from operator import and_

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from app.models.transformer.visibility.atoms import (
    Fixed,
    Global,
    Local,
    Longformer,
    Marked,
    Sinks,
    Strided,
)
from app.models.transformer.visibility.pattern import CAUSAL, And, Pattern
from app.models.transformer.visibility.pattern_fit import blind_query, check_pattern
from app.models.transformer.visibility.pattern_text import parse

from ..strategies import atoms, patterns, small


def seen(pattern: Pattern, q: int) -> list[int]:
    return [k for k in range(q + 1) if pattern.allow(q, k)]


def row(pattern: Pattern, q: int, n: int = 16) -> str:
    keys = seen(pattern, q)
    return "".join("1" if k in keys else "0" for k in range(n))


@pytest.mark.parametrize(
    "text,count",
    [
        ("causal", 136),
        ("local(4)", 58),
        ("local(5)", 70),
        ("strided(4)", 40),
        ("local(4) | strided(4)", 82),
        ("local(5) | strided(4)", 82),
        ("fixed(4, 1)", 64),
        ("local(4) | global(1)", 70),
        ("longformer(4, 1)", 70),
        ("longformer(4, 0)", 58),
        ("local(4, 2)", 52),
        ("sinks(2, 4)", 81),
        ("global(2) | local(4)", 81),
    ],
)
def test_counts_by_hand(text: str, count: int) -> None:
    """n=16 的可见对数，由各论文的定义逐格数出。"""
    assert sum(len(seen(parse(text), q)) for q in range(16)) == count


def test_rows_by_hand() -> None:
    merged, fixed = parse("local(4) | strided(4)"), Fixed(4, 1)
    assert row(merged, 15) == "0001000100011111"
    assert row(fixed, 15) == "0001000100011111"
    assert row(merged, 9) == "0100011111000000"
    assert row(fixed, 9) == "0001000111000000"


def two_steps(first: Pattern, second: Pattern, n: int = 16) -> int:
    """先按 second 读、下一层按 first 读，一共够得着多少对。"""
    return sum(len({k for m in seen(first, q) for k in seen(second, m)}) for q in range(n))


def test_two_steps_reach_everything() -> None:
    """Sparse Transformer 的要求：两层之内任何一对都连通。"""
    assert two_steps(Strided(4), Local(4)) == two_steps(Local(4), Strided(4)) == 136
    assert two_steps(Fixed(4, 1), Fixed(4, 1)) == 136
    assert two_steps(Local(4), Local(4)) < 136


@given(patterns, st.integers(0, 40))
def test_bounds_hold(pattern: Pattern, q: int) -> None:
    """看得见的键都在最近 reach 个或最前 pinned 个之内。"""
    reach = pattern.reach
    if reach is not None:
        assert all(k > q - reach or k < pattern.pinned for k in seen(pattern, q))
    if pattern.sees_itself:
        assert q in seen(pattern, q)


@pytest.mark.parametrize(
    "text,reach,pinned",
    [
        ("causal", None, 0),
        ("local(4)", 4, 0),
        ("local(4, 3)", 10, 0),
        ("strided(4)", None, 0),
        ("fixed(8, 2)", None, 0),
        ("global(3)", 0, 3),
        ("longformer(4, 2, 3)", 10, 2),
        ("sinks(2, 5)", 5, 2),
        ("local(4) | global(3)", 4, 3),
        ("local(4) | strided(3)", None, 0),
        ("local(4) & strided(3)", 4, 0),
        ("local(4) & local(6, 2)", 4, 0),
        ("sinks(2, 9) & local(5)", 5, 2),
        ("strided(3) & global(4)", 0, 4),
        ("(local(4) | global(3)) & strided(2)", 4, 3),
    ],
)
def test_bounds_are_tight(text: str, reach: int | None, pinned: int) -> None:
    """缓存的容量由它们定：松了就是白占内存。"""
    pattern = parse(text)
    assert (pattern.reach, pattern.pinned) == (reach, pinned)


@given(patterns)
def test_a_solid_context_is_causal(pattern: Pattern) -> None:
    """上下文不超过 solid 时，省去掩码的快路径必须与图样相同。"""
    assert all(len(seen(pattern, q)) == q + 1 for q in range(min(pattern.solid, 40)))


@pytest.mark.parametrize(
    "text,solid",
    [
        ("local(9)", 9),
        ("local(9, 2)", 1),
        ("strided(3)", 1),
        ("fixed(8, 2)", 8),
        ("global(5)", 5),
        ("local(9) | global(5)", 9),
        ("local(9) & strided(1)", 9),
        ("longformer(4, 6)", 6),
    ],
)
def test_how_long_a_pattern_is_causal(text: str, solid: int) -> None:
    assert parse(text).solid == solid


@given(patterns, st.integers(0, 40), st.booleans())
def test_clauses_are_the_pattern(pattern: Pattern, q: int, marked: bool) -> None:
    clauses = pattern.clauses()
    assert len(clauses) <= pattern.spread
    for k in range(q + 1):
        joined = any(all(bool(a.allow(q, k, marked)) for a in clause) for clause in clauses)
        assert joined == bool(pattern.allow(q, k, marked))
    assert all(len(atom.clauses()) == 1 for clause in clauses for atom in clause)


@given(patterns)
def test_tensors_and_integers_agree(pattern: Pattern) -> None:
    q, k = torch.arange(12)[:, None], torch.arange(12)[None]
    mask = pattern.allow(q, k) & (k <= q)
    assert mask.shape == (12, 12) and mask.dtype == torch.bool
    assert [mask[i].nonzero()[:, 0].tolist() for i in range(12)] == [
        seen(pattern, i) for i in range(12)
    ]


@given(patterns, patterns)
def test_and_or_mean_what_they_say(a: Pattern, b: Pattern) -> None:
    assume(a.spread * b.spread <= 64)
    q = 23
    assert set(seen(a & b, q)) == set(seen(a, q)) & set(seen(b, q))
    assert set(seen(a | b, q)) == set(seen(a, q)) | set(seen(b, q))
    assert (a & a, a | a) == (a, a)
    assert (a & CAUSAL, CAUSAL & a) == (a, a)
    assert a | CAUSAL == CAUSAL | a == CAUSAL


def test_equal_patterns_are_one_key() -> None:
    a, b, c = Local(4), Global(2), Strided(3)
    assert (a | b) | c == a | (b | c) and hash((a | b) | c) == hash(a | (b | c))
    assert (a & b) & c == a & (b & c)
    assert a | b | a == a | b
    assert len({Local(4), Local(4, 1), parse("local(window=4)"), a | a}) == 1
    assert Local(4) != Local(5) and Local(4) != Strided(4)


def test_marked_tokens_see_and_are_seen() -> None:
    pattern = Longformer(2, 1)
    assert pattern.takes_marks and (pattern & Strided(2)).takes_marks and not CAUSAL.takes_marks
    assert [k for k in range(9) if pattern.allow(8, k)] == [0, 7, 8]
    assert all(pattern.allow(8, k, True) for k in range(9))
    assert not Marked().allow(3, 4, True)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: Local(0), r"local\(window=0\): window must be an integer from 1"),
        (lambda: Local(True), r"local\(window=True\)"),
        (lambda: Local(4, -1), r"local\(dilation=-1\)"),
        (lambda: Local(1 << 31), "window must be an integer from 1 to"),
        (lambda: Strided(0), r"strided\(stride=0\)"),
        (lambda: Fixed(4, 0), r"fixed\(c=0\)"),
        (lambda: Fixed(4, 5), r"fixed\(length=4, c=5\).*use c <= 4"),
        (lambda: Global(0), r"global\(n=0\)"),
        (lambda: Longformer(4, -1), r"longformer\(n_global=-1\).* from 0"),
        (lambda: Sinks(0, 4), r"sinks\(n=0\)"),
        (lambda: Sinks(4, 0), r"sinks\(window=0\)"),
    ],
)
def test_impossible_atoms(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_patterns_that_unfold_too_far_are_refused() -> None:
    """析取范式会翻倍地长；64 个子句以内照常。"""
    pattern: Pattern = Local(1) | Strided(2)
    for n in range(2, 7):
        pattern = pattern & (Local(n) | Strided(n + 1))
    assert pattern.spread == 64
    with pytest.raises(ValueError, match="unfolds into 128 alternatives, more than 64"):
        pattern & (Local(9) | Strided(9))


def brute_blind(pattern: Pattern, context: int) -> int | None:
    return next((q for q in range(context) if not seen(pattern, q)), None)


# 看不见自己的图样都少不了 global：单靠随机很少碰到，所以直接造它们的并。
prefixed = st.builds(and_, st.builds(Global, small), atoms)
unions = st.lists(prefixed, min_size=1, max_size=3).map(
    lambda parts: parts[0] if len(parts) == 1 else parts[0] | parts[1] | parts[-1]
)


@given(st.one_of(patterns, unions), st.integers(1, 60))
def test_blind_query_against_brute_force(pattern: Pattern, context: int) -> None:
    assert blind_query(pattern, context) == brute_blind(pattern, context)


@pytest.mark.parametrize(
    "text,blind",
    [
        ("global(4)", None),
        ("global(4) & local(3)", 6),
        ("global(4) & strided(4)", None),
        ("global(4) & strided(5)", 4),
        ("global(3) & fixed(4, 1)", 4),
        ("global(4) & fixed(4, 1)", None),
        ("(global(4) & local(3)) | (global(2) & strided(2))", None),
        ("global(1000000) & local(3)", 1000002),
        ("global(9000) & strided(9000)", None),
        ("global(10000000)", None),
        ("longformer(2, 0) & global(3)", 4),
    ],
)
def test_blind_queries_by_hand(text: str, blind: int | None) -> None:
    assert blind_query(parse(text), 2_000_000) == blind


def test_a_pattern_too_irregular_to_check_is_refused() -> None:
    text = "(global(9000) & fixed(9001, 1)) | (global(9000) & strided(9000))"
    with pytest.raises(ValueError, match="too irregular to check.*add '| local"):
        blind_query(parse(text), 10_000_000)


@pytest.mark.parametrize(
    "text,message",
    [
        ("local(65)", r"window=65 of local\(65\) is more than context_size=64: use window <= 64"),
        ("strided(65) | local(4)", "stride=65"),
        ("fixed(65, 1)", "length=65"),
        ("global(65) | local(4)", "n=65"),
        ("longformer(4, 65)", "n_global=65"),
        ("sinks(4, 65)", "window=65"),
        ("local(33, 2)", "reaches 65 positions back, more than context_size=64: use window <= 32"),
        ("global(2) & local(3)", r"position 4 sees no key .*add '\| local\(1\)'"),
    ],
)
def test_patterns_that_do_not_fit_the_context(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pattern(parse(text), 64)


@pytest.mark.parametrize(
    "text, least",
    [
        ("local(64)", 64), ("strided(64)", 64), ("fixed(64, 64)", 64), ("global(64)", 64),
        ("local(32, 2)", 63), ("causal", 1),
    ],
)  # fmt: skip
def test_patterns_that_just_fit(text: str, least: int) -> None:
    """64 放得下；least 是放得下的最小上下文，再少一个就拒绝。"""
    pattern = parse(text)
    for context in {least, 64}:
        check_pattern(pattern, context)
        assert all(seen(pattern, q) for q in range(context))
    if text != "causal":
        with pytest.raises(ValueError, match=f"more than context_size={least - 1}"):
            check_pattern(pattern, least - 1)


def test_a_hand_made_and_of_causal_keeps_clauses_clean() -> None:
    """降低到各后端的代码指望 causal 只单独出现。"""
    assert And((CAUSAL, Local(3))).clauses() == ((Local(3),),)
    assert And((CAUSAL,)).clauses() == ((CAUSAL,),)

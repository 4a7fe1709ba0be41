"""图样的文字：往返，写法，每个错误说出该怎么写，敌意的文字立刻结束。"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.models.transformer.visibility.atoms import Fixed, Global, Local, Longformer, Sinks, Strided
from app.models.transformer.visibility.pattern import CAUSAL, Pattern
from app.models.transformer.visibility.pattern_text import parse, signature_of

from ..strategies import patterns


@given(patterns)
def test_text_round_trip(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern
    assert str(parse(str(pattern))) == str(pattern)


@pytest.mark.parametrize(
    "text,pattern",
    [
        ("local(256) | global(16)", Local(256) | Global(16)),
        ("  local( 256)|\n global(16) ", Local(256) | Global(16)),
        ("strided(64) & local(window=1024, dilation=2)", Strided(64) & Local(1024, 2)),
        ("local(dilation=2, window=1_024)", Local(1024, 2)),
        ("longformer(256, 16)", Longformer(256, 16)),
        ("longformer(256, n_global=0, dilation=3)", Longformer(256, 0, 3)),
        ("sinks(4, 256)", Sinks(4, 256)),
        ("fixed(128, 8)", Fixed(128, 8)),
        ("causal", CAUSAL),
        ("((causal))", CAUSAL),
        ("local(4) | global(2) & strided(3)", Local(4) | (Global(2) & Strided(3))),
        ("(local(4) | global(2)) & strided(3)", (Local(4) | Global(2)) & Strided(3)),
        ("causal & local(3)", Local(3)),
        ("causal | local(3)", CAUSAL),
    ],
)
def test_texts(text: str, pattern: Pattern) -> None:
    assert parse(text) == pattern


@pytest.mark.parametrize(
    "text,message",
    [
        ("lokal(4)", "attention pattern 'lokal.4.': unknown pattern 'lokal': did you mean 'local'"),
        ("local(4) | globl(2)", "unknown pattern 'globl': did you mean 'global'"),
        ("lambda", "unknown pattern 'lambda'"),
        ("zzz", "unknown pattern 'zzz': known are causal, local"),
        ("marked", "unknown pattern 'marked'"),
        ("local", r"local lacks window: write local\(window, dilation=1\)"),
        ("fixed(8)", r"fixed lacks c: write fixed\(length, c\)"),
        ("strided(4, 2)", r"strided got 2 arguments: write strided\(stride\)"),
        ("causal(4)", "causal got 1 arguments: write causal$"),
        ("local(4, dilatoin=2)", r"local has no argument 'dilatoin': write local\(window, dil"),
        ("local(4, window=4)", "local got 'window' twice"),
        ("local(dilation=2, dilation=3, window=1)", "local got 'dilation' twice"),
        ("local(window)", r"the arguments of local are integers: write local\("),
        ("local(1e3)", "'1e3' is not an integer"),
        ("local(0x10)", "'0x10' is not an integer"),
        ("local(4or 2)", "'4or' is not an integer"),
        ("local(-4)", r"local\(window=-4\): window must be an integer from 1"),
        ("local(--4)", "the arguments of local are integers"),
        ("local(4.0)", "unexpected character '.'"),
        ("local('4')", "unexpected character"),
        ("", "is not a pattern: write it like 'local.256. | global.16.'"),
        ("local(4", "is not a pattern"),
        ("local(4) global(2)", "is not a pattern"),
        ("local(4) or global(2)", "is not a pattern"),
        ("local(4) + global(2)", "only atoms joined with & and | are allowed"),
        ("local(4)(5)", "only atoms joined"),
        ("local(4), global(2)", "only atoms joined"),
        ("4", "only atoms joined"),
        ("local(4) | 3", "only atoms joined"),
        ("__import__(1)", "unknown pattern '__import__'"),
        ("local\uff08256\uff09", "unexpected character"),
        ("(" * 17 + "causal" + ")" * 17, "more than 16 nested parentheses"),
        ("local(9)|" * 100 + "causal", "has 906 characters, more than 512"),
    ],
)
def test_every_text_error_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("junk", [None, 3, b"causal", ["causal"], CAUSAL])
def test_what_is_no_text(junk: object) -> None:
    with pytest.raises(ValueError, match="is not text"):
        parse(junk)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["(" * 10**6, "-" * 500, "local(" * 80, "(((" * 5, "1" * 512])
def test_hostile_texts_end_at_once(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert len(str(caught.value)) < 800


words = st.sampled_from(
    ["local", "global", "fixed", "causal", "(", ")", ",", "&", "|", "=", "-", "4", "n", " ", "not"]
)


@given(st.one_of(st.text(max_size=30), st.lists(words, max_size=14).map("".join)))
def test_any_text_is_a_pattern_or_a_value_error(text: str) -> None:
    try:
        pattern = parse(text)
    except ValueError:
        return
    assert parse(str(pattern)) == pattern


def test_signatures_are_the_classes() -> None:
    assert signature_of("longformer") == "longformer(window, n_global, dilation=1)"
    assert signature_of("causal") == "causal"

"""停止串：流出的文本与「先全部生成、再找最早的停止串」相同，片段怎么切都一样。"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.generation.config import Options
from app.generation.stopping import StopText

texts = st.text("ab\n", max_size=30)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3)


def chop(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def longest_match_free(text: str, stops: list[str]) -> tuple[str, bool]:
    found = [text.find(s) for s in stops if s in text]
    return (text[: min(found)], True) if found else (text, False)


@given(texts, stop_lists, st.lists(st.integers(0, 30), max_size=10), st.integers(0, 3))
@settings(max_examples=400, deadline=None)
def test_single_characters_and_any_pieces_agree_with_searching_afterwards(text, stops, cuts, tail):
    """逐字符喂时最早完成的停止串生效；那正是最短前缀里最早的匹配。"""
    prefix = next(
        (text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in stops)), text
    )
    wanted, stopped = longest_match_free(prefix, stops)
    sink, out = StopText(stops), ""
    for char in text:
        out += sink.feed(char)
        assert wanted.startswith(out)
        if sink.stopped:
            break
    if not sink.stopped:
        out += sink.close("")
    assert (out, sink.stopped) == (wanted, stopped)
    assert sink.kept_tokens() == len(wanted)

    pieces = chop(text, cuts)
    sink, out = StopText(stops), ""
    for piece in pieces[: len(pieces) - tail]:
        out += sink.feed(piece)
        if sink.stopped:
            break
    fed = "".join(pieces[: len(pieces) - tail])
    if not sink.stopped:
        out += sink.close("")
    assert sink.stopped == any(s in fed for s in stops)
    assert not any(s in out for s in stops)
    assert fed.startswith(out)
    if not sink.stopped:
        assert out == fed


def test_a_stop_string_across_three_tokens_is_held_back_and_cut():
    sink = StopText(["\nUser:"])
    assert sink.feed("hi") == "hi"
    assert sink.feed(" you\nUs") == " you"
    assert sink.feed("er") == ""
    assert sink.feed(": x") == ""
    assert sink.stopped and sink.kept_tokens() == 1


def test_a_false_start_is_released():
    sink = StopText(["END"])
    assert sink.feed("aE") == "a"
    assert sink.feed("N") == ""
    assert sink.feed("x") == "ENx"
    assert sink.feed("E") == "" and sink.close("") == "E"
    assert sink.kept_tokens() == 4


def test_half_a_character_before_the_cut_is_not_kept():
    """第二个词元只带来半个字符（空片段），它的字符在切口之后：不算在留下的词元里。"""
    sink = StopText(["é"])
    assert sink.feed("a") == "a"
    assert sink.feed("") == ""
    assert sink.feed("é") == ""
    assert sink.stopped and sink.kept_tokens() == 1


def test_a_stop_in_what_the_decoder_had_left():
    sink = StopText(["z"])
    assert sink.feed("a") == "a"
    assert sink.close("bz") == "b"
    assert sink.stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Options(max_new_tokens=1, stop_strings=[""])

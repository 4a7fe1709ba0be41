"""命令行里的转义：与 Python 的字符串写法相同，不认识的拒绝。"""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.common.escapes import unescape

pieces = st.sampled_from([r"\n", r"\t", r"\r", r"\\", r"\x41", r"\u4f60", "a", "n", "你", " "])


@given(st.lists(pieces, max_size=9))
def test_like_a_python_string(parts):
    text = "".join(parts)
    assert unescape(text, "stop") == ast.literal_eval(f'"{text}"')


@pytest.mark.parametrize("text", ["\\", "a\\d", r"\x4", r"\u12", r"\\" + "\\"])
def test_what_is_no_escape_is_refused(text):
    with pytest.raises(ValueError, match="stop=.* is no escape .*write two"):
        unescape(text, "stop")

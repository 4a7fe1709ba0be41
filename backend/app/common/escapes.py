"""命令行里敲得出的转义：shell 把 "\\n" 原样交来，是反斜杠与 n 两个字符。"""

from __future__ import annotations

import re

_PLAIN = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.?))", re.DOTALL)


def unescape(text: str, name: str) -> str:
    r"""\n \t \r \\ \xNN \uNNNN 换成它们所指的字符；name 是错误里点名的选项。

    Raises:
        ValueError: 不认识的转义。
    """

    def one(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code:
            return chr(int(code, 16))
        if match[3] not in _PLAIN:
            raise ValueError(
                f"{name}={text!r}: {match[0]!r} is no escape (known: \\n \\t \\r \\\\ \\xNN "
                "\\uNNNN): for a backslash itself write two"
            )
        return _PLAIN[match[3]]

    return _ESCAPE.sub(one, text)

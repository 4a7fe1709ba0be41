"""标准输出与标准错误：编不出的字符不该结束任何工作。"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def tolerant_output() -> None:
    r"""控制台的编码写不出的字符（cp1252 里的汉字、ascii 里的一切）写成 \uNNNN，不再抛错。"""
    for stream in (sys.stdout, sys.stderr):
        # pythonw 没有标准输出；测试与笔记本可能换成别的对象，它们不编码。
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def forget_reader() -> None:
    """读的一方（如 head）已经走了：换掉标准输出，免得解释器退出时再报一次。"""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    r"""打印一行；没有经过 tolerant_output 的程序里，写不出的字符同样写成 \uNNNN。"""
    print(printable(text, sys.stdout), flush=True)


def printable(text: str, stream: TextIO | None) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding, "replace")

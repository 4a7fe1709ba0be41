"""标准输出与标准错误：编不出的字符不该结束任何工作。"""

from __future__ import annotations

import io
import sys


def tolerant_output() -> None:
    r"""控制台的编码写不出的字符（cp1252 里的汉字、ascii 里的一切）写成 \uNNNN，不再抛错。"""
    for stream in (sys.stdout, sys.stderr):
        # pythonw 没有标准输出；测试与笔记本可能换成别的对象，它们不编码。
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

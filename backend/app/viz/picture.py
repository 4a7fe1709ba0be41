"""一张图怎样建、怎样写：不碰 pyplot 的全局状态，不覆盖已有的文件。matplotlib 只在函数里导入。"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.common.files import check_new, write_new

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120
# DejaVu 没有汉字、假名与谚文；装了下面哪一种就用哪一种。
_FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC",
    "Hiragino Sans GB", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Arial Unicode MS",
)  # fmt: skip
# 看不见的字符写成看得见的。
_SHOWN = {" ": "␣", "\n": "↵", "\t": "→", "\r": "←"}


def new_figure(width: float, height: float) -> Figure:
    """width、height 以英寸计。"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_picture(path: Path, kinds: tuple[str, ...] = (".png",)) -> None:
    """画之前就查，免得算完才知道写不下。

    Raises:
        ValueError: 不是 kinds 之一，已经存在，或文件夹不存在。
    """
    if path.suffix.lower() not in kinds:
        raise ValueError(
            f"out={path} does not end in {' or '.join(kinds)}: "
            f"use --out {path.with_suffix(kinds[0])}"
        )
    check_new(path)


def write_picture(figure: Figure, path: Path) -> None:
    """写 PNG。

    Raises:
        FileExistsError: 文件已存在。
    """
    write_new(path, png(figure))


def png(figure: Figure) -> bytes:
    """在内存里画完，所以不留半个文件。"""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=_DPI, format="png")
    return picture.getvalue()


@cache
def _fonts() -> tuple[tuple[str, ...], frozenset[int]]:
    """(字体, 它们合起来有的字符)。"""
    from matplotlib import font_manager

    names = set(font_manager.get_font_names())
    families = ("DejaVu Sans", *(name for name in _FALLBACKS if name in names))
    covered: set[int] = set()
    for family in families:
        covered |= set(font_manager.get_font(font_manager.findfont(family)).get_charmap())
    return families, frozenset(covered)


def label_style() -> dict[str, Any]:
    """词元标签的样式；$ 是普通字符，不是公式。"""
    return {"family": list(_fonts()[0]), "parse_math": False}


def token_label(raw: bytes, longest: int = 12) -> str:
    """词元的字节 -> 短而看得见的标签：空格与换行有记号，坏的 UTF-8 与没有字形的字符写成编码。"""
    text = "".join(map(_legible, raw.decode("utf-8", "surrogateescape")))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _legible(char: str) -> str:
    code = ord(char)
    if char in _SHOWN:
        return _SHOWN[char]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if char.isprintable() and code in _fonts()[1]:
        return char
    return f"U+{code:04X}"

"""图样的图：哪个查询看得见哪些键。

T 词元数。
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.models.transformer.visibility.coverage import Coverage, coverage, seen
from app.models.transformer.visibility.pattern import Pattern

from .picture import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PATTERNS = 12
_FUTURE, _HIDDEN, _SEEN = 0, 1, 2
_COLOURS = ("#d9d9d9", "white", "black")
_TITLE_CHARS = 44


def describe_coverage(found: Coverage) -> str:
    """一行：每个查询几个键，占因果的几成；估计的数前有 ~。"""
    about = "" if found.exact else "~"
    return (
        f"{about}{found.mean:.1f} keys per query, at most {found.most}; "
        f"{about}{found.share:.1%} of the causal pairs"
    )


def pattern_figure(patterns: Sequence[Pattern], length: int) -> Figure:
    """几个图样并排，每个 length 个词元。"""
    columns = min(len(patterns), 4)
    rows = math.ceil(len(patterns) / columns)
    figure = new_figure(0.3 + 4.2 * columns, 0.5 + 4.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(patterns) :]:
        axes.remove()
    for axes, pattern in zip(grid.flat, patterns, strict=False):
        draw_pattern(axes, pattern, length)
        axes.set(xlabel="key position", ylabel="query position")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_pattern(axes: Any, pattern: Pattern, length: int) -> None:
    """黑 = 看得见，白 = 图样遮住，灰 = 还没有到；标题是图样与它的数目。"""
    from matplotlib.colors import ListedColormap

    image = np.where(np.tri(length, dtype=bool), _HIDDEN, _FUTURE)
    image[seen(pattern, length).numpy()] = _SEEN
    # 像素比格子少时就近取样会整列漏掉，所以大图用平均。
    axes.imshow(
        image, cmap=ListedColormap(_COLOURS), vmin=_FUTURE, vmax=_SEEN,
        interpolation="nearest" if length <= 256 else "antialiased", interpolation_stage="rgba",
    )  # fmt: skip
    if length <= 32:
        axes.set_xticks(np.arange(length + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(length + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#bbbbbb", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    axes.set_title(pattern_title(pattern, length), fontsize=9)


def pattern_name(pattern: Pattern) -> str:
    """图样的文字，长的折行。"""
    return "\n".join(textwrap.wrap(str(pattern), _TITLE_CHARS))


def pattern_title(pattern: Pattern, length: int) -> str:
    return f"{pattern_name(pattern)}\n" + describe_coverage(coverage(pattern, length)).replace(
        "; ", "\n"
    )


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    names = ("future", "hidden by the pattern", "seen")
    return [
        Patch(facecolor=colour, edgecolor="#888888", label=name)
        for colour, name in reversed(list(zip(_COLOURS, names, strict=True)))
    ]

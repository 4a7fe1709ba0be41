"""哪个专家接了哪个词元：PNG 里每层一条，终端里是上了色的文字。

T 词元数、k 每个词元的专家数、E 专家数。专家 E = 填充，或超出容量。
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .attention import MOST_LABELS
from .picture import label_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text

MOST_LAYERS = 48
_TITLE = 11
# 图上的底：没有权重的格子近乎白。
_NOTHING = "#f2f2f2"
# 直接写出编号的上限：更多时颜色会重复，靠编号区分。
_DISTINCT = 20


def expert_colours(count: int) -> list[tuple[int, int, int]]:
    """E 种颜色 (r, g, b)，0..255；前 10 种彼此最分明，第 21 种起又从头来。"""
    from matplotlib import colormaps

    colours = colormaps["tab20"].resampled(_DISTINCT)
    # tab20 深浅相间：先取十个深的，再取十个浅的。
    order = [*range(0, _DISTINCT, 2), *range(1, _DISTINCT, 2)]
    picked = (colours(order[e % _DISTINCT]) for e in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b, _ in picked]


def routing_figure(
    routing: Mapping[int, tuple[np.ndarray, np.ndarray]],
    labels: Sequence[str],
    experts: int,
    title: str,
) -> Figure:
    """每层一格：横轴词元，纵轴专家；颜色是专家，越满权重越大，k 个专家就有 k 格。

    Args:
        routing: {层: (专家 (T, k)，权重 (T, k))}。
        labels: T 个词元的标签。

    Raises:
        ValueError: 层太多。
    """
    if not 1 <= len(routing) <= MOST_LAYERS:
        raise ValueError(
            f"{len(routing)} layers do not fit in one picture of at most {MOST_LAYERS}: "
            "choose some with --layer"
        )
    length = len(labels)
    width = min(max(5.0, 0.2 * length + 1.5), 26.0)
    height = min(max(1.0, 0.2 * experts), 5.0)
    figure = new_figure(width, len(routing) * (height + 0.55) + 1.6)
    grid = figure.subplots(len(routing), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (layer, (chosen, weight)) in zip(grid, routing.items(), strict=True):
        table = weight_table(chosen, weight, experts)
        axes.imshow(
            _shaded(table), aspect="auto", interpolation="nearest", origin="lower",
        )  # fmt: skip
        load = np.bincount(chosen.ravel(), minlength=experts + 1)[:experts]
        axes.set_title(f"layer {layer}: {load_text(load)}", fontsize=_TITLE, loc="left")
        shown = list(range(0, experts, -(-experts // 16)))
        axes.set_yticks(shown, [str(e) for e in shown], fontsize=8)
        axes.set_ylabel("expert", fontsize=9)
        axes.tick_params(length=2, pad=1.5)
    step = -(-length // MOST_LABELS)
    ticks = list(range(0, length, step))
    names = [labels[i] if step == 1 else f"{i} {labels[i]}" for i in ticks]
    grid[-1].set_xticks(ticks, names, rotation=90, fontsize=8, **label_style())
    grid[-1].set_xlabel("token; full colour = weight 1, pale = weight near 0")
    # 长的路径会伸出图外；这个字号一英寸约九个字。
    lines = textwrap.fill(title, round(8 * width))
    figure.suptitle(lines, fontsize=_TITLE + 2, parse_math=False)
    return figure


def weight_table(chosen: np.ndarray, weight: np.ndarray, experts: int) -> np.ndarray:
    """(E, T)：每个词元给每个专家的权重；没有挑中的是 0。"""
    table = np.zeros((experts + 1, len(chosen)))
    for row, values in zip(chosen.T, weight.T, strict=True):
        table[row, np.arange(len(chosen))] = values
    return table[:experts]


def _shaded(table: np.ndarray) -> np.ndarray:
    """(E, T) -> (E, T, 3)：从底色到专家的颜色；挑中的至少有三成，权重小也看得见。"""
    from matplotlib.colors import to_rgb

    colours = np.array(expert_colours(len(table)))[:, None] / 255
    part = np.where(table > 0, 0.3 + 0.7 * np.clip(table, 0, 1), 0.0)[..., None]
    shaded: np.ndarray = part * colours + (1 - part) * np.array(to_rgb(_NOTHING))
    return shaded


def load_text(load: np.ndarray) -> str:
    """一层的负载：MaxVio = 最忙的 / 平均 - 1，与没有词元的专家。"""
    mean = load.mean()
    vio = f"MaxVio {load.max() / mean - 1:.2f}" if mean else "no tokens"
    idle = int((load == 0).sum())
    return vio if not idle else f"{vio}, {idle} of {len(load)} experts without a token"


def coloured_text(
    pieces: Sequence[str], chosen: np.ndarray, experts: int, weight: np.ndarray
) -> Text:
    """一层的文字：底色是权重最大的专家；没有专家的不上色。"""
    from rich.text import Text

    text = Text()
    for piece, expert in zip(pieces, first_expert(chosen, weight), strict=True):
        text.append(piece, style=expert_style(int(expert), experts))
    return text


def expert_style(expert: int, experts: int) -> str:
    """rich 的样式；底色亮就用黑字。"""
    if expert >= experts:
        return ""
    red, green, blue = expert_colours(experts)[expert]
    # 相对亮度的近似（ITU-R BT.601 的系数）。
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    return f"{'black' if bright else 'white'} on rgb({red},{green},{blue})"


def first_expert(chosen: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(T,)：每个词元权重最大的专家；sigmoid 的偏置会让次序与权重不同，所以不取第一个。"""
    picked: np.ndarray = chosen[np.arange(len(chosen)), weight.argmax(1)]
    return picked


def plain_text(pieces: Sequence[str], chosen: np.ndarray, weight: np.ndarray, experts: int) -> str:
    """没有颜色时：每个词元后面是它的专家，权重大的在前：`the[3,5]`；没有专家的是 [-]。"""
    parts = []
    for piece, row, values in zip(pieces, chosen, weight, strict=True):
        order = sorted(range(len(row)), key=lambda i: -values[i])
        names = [str(row[i]) if row[i] < experts else "-" for i in order]
        parts.append(f"{piece}[{','.join(names)}]")
    return " ".join(parts)


def legend(experts: int) -> Text:
    from rich.text import Text

    text = Text("expert ")
    for expert in range(experts):
        text.append(f" {expert} ", style=expert_style(expert, experts))
    return text

"""头的得分的图：一个检查点画成层 x 头的格子，几个检查点画成随步数走的线。

C 检查点数、N 层数、H 查询头数。
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from app.inspection.heads import Heads

from .picture import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "induction": "induction: what followed last time",
    "previous": "previous token",
    "first": "first token",
}


def heads_figure(scores: Mapping[str, Heads], title: str) -> Figure:
    """scores: {检查点的名字: 得分}。"""
    figure = new_figure(13.0, 4.2)
    panels = figure.subplots(1, len(_TITLES), sharey=True)
    for axes, (kind, name) in zip(panels, _TITLES.items(), strict=True):
        values = np.stack([getattr(one, kind) for one in scores.values()])
        (_draw_grid if len(values) == 1 else _draw_lines)(axes, values, list(scores))
        axes.set_title(name, fontsize=11)
    if len(scores) > 1:
        title += "; dark = first layer, bright = last"
    panels[0].set_ylabel("layer" if len(scores) == 1 else "mean attention weight")
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _draw_lines(axes: Any, values: np.ndarray, names: list[str]) -> None:
    """(C, N, H)：一个头一条线，一层一种颜色；最高的写上名字。"""
    from matplotlib import colormaps

    steps = [int(name.rpartition("-")[2]) for name in names]
    colours = colormaps["viridis"].resampled(max(2, values.shape[1]))
    for layer, head in np.ndindex(values.shape[1:]):
        axes.plot(steps, values[:, layer, head], color=colours(layer), linewidth=1)
    layer, head = np.unravel_index(values[-1].argmax(), values.shape[1:])
    axes.annotate(
        f"{layer}.{head}", (steps[-1], values[-1, layer, head]), fontsize=9,
        textcoords="offset points", xytext=(-18, 5),
    )  # fmt: skip
    axes.set(xlabel="step", ylim=(0, 1))
    axes.grid(alpha=0.3)


def _draw_grid(axes: Any, values: np.ndarray, names: list[str]) -> None:
    """(1, N, H)。"""
    axes.imshow(values[0], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xlabel("head")
    axes.set_xticks(range(values.shape[2]))
    axes.set_yticks(range(values.shape[1]))

"""注意力图的图：每层先是图样，再是各头的平均，再是点名的头。

H 头数、T 词元数。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.inspection.patterns import hidden
from app.models.transformer.visibility.pattern import Pattern

from .pattern import draw_pattern, pattern_name
from .picture import label_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 60
# 每个词元都写上标签的上限；更多时隔几个写一个，连同它的序号。
MOST_LABELS = 64
# 一层的格子多于这些就分成几行，免得图宽得看不清字。
_COLUMNS = 3
_HIDDEN = "#d9d9d9"
_TITLE = 11


def attention_figure(
    maps: Mapping[int, np.ndarray],
    patterns: Sequence[Pattern],
    labels: Sequence[str],
    heads: Sequence[int],
    title: str,
) -> Figure:
    """
    Args:
        maps: {层: (H, T, T)}，每行是一个查询的权重。
        patterns: 每层的图样。
        labels: T 个词元的标签。
        heads: 除平均之外单独画的头。

    Raises:
        ValueError: 一张图里的格子太多。
    """
    each = 2 + len(heads)
    if len(maps) * each > MOST_PANELS:
        raise ValueError(
            f"{len(maps)} layers with {each} panels each are more than {MOST_PANELS} panels: "
            "choose fewer with --layer and --head"
        )
    lines = -(-each // _COLUMNS)
    columns = -(-each // lines)
    cell = min(max(3.2, 0.13 * len(labels)), 8.5)
    figure = new_figure(columns * (cell + 0.6) + 0.3, len(maps) * lines * (cell + 1.4) + 1.2)
    grid = figure.subplots(len(maps) * lines, columns, squeeze=False)
    image: Any = None
    used: list[Any] = []
    for number, (layer, weights) in enumerate(maps.items()):
        panels = list(grid[number * lines : (number + 1) * lines].flat)
        for unused in panels[each:]:
            unused.remove()
        pattern = patterns[layer]
        draw_pattern(panels[0], pattern, len(labels))
        panels[0].set_title(f"layer {layer}: {panels[0].get_title()}", fontsize=_TITLE)
        shown = {f"mean of {len(weights)} heads": weights.mean(0)}
        shown |= {f"head {head}": weights[head] for head in heads}
        cells = hidden([pattern], len(labels))[0]
        for axes, (name, values) in zip(panels[1:each], shown.items(), strict=True):
            image = _draw_map(axes, np.ma.array(values, mask=cells))
            axes.set_title(f"layer {layer}, {name}\n{pattern_name(pattern)}", fontsize=_TITLE)
        used += panels[:each]
    for axes in used:
        _label_tokens(axes, labels)
    bar = figure.colorbar(image, ax=used, location="bottom", shrink=0.6, aspect=50, pad=0.01)
    bar.set_label("attention weight (square-root scale); grey = not visible, black = visible")
    figure.suptitle(title, fontsize=_TITLE + 2, parse_math=False)
    return figure


def _draw_map(axes: Any, values: np.ma.MaskedArray) -> Any:
    """各格同一把尺，可以互相比较；取平方根，否则长句里 1/T 上下的权重全是一片黑。"""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    colours = colormaps["viridis"].with_extremes(bad=_HIDDEN)
    return axes.imshow(
        values, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest"
    )


def _label_tokens(axes: Any, labels: Sequence[str]) -> None:
    step = -(-len(labels) // MOST_LABELS)
    ticks = list(range(0, len(labels), step))
    names = [labels[i] if step == 1 else f"{i} {labels[i]}" for i in ticks]
    axes.set_xticks(ticks, names, rotation=90, fontsize=8, **label_style())
    axes.set_yticks(ticks, names, fontsize=8, **label_style())
    axes.tick_params(length=2, pad=1.5)
    axes.set(xlabel="key", ylabel="query")

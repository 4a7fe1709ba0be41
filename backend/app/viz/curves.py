"""折线图（chart.py 的那种）画成一张 PNG。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chart import Chart, short, y_range
from .picture import new_figure, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 7.5, 5.0
_STACKED_WIDTH, _STACKED_HEIGHT = 9.0, 6.0


def draw_charts(charts: Sequence[Chart], path: Path) -> None:
    """各图并排，图例在第一张。

    Raises:
        FileExistsError: 文件已存在。
    """
    figure = new_figure(_WIDTH * len(charts), _HEIGHT)
    _draw_all(figure.subplots(1, len(charts), squeeze=False)[0], charts)
    write_picture(figure, path)


def stacked(charts: Sequence[Chart], heights: Sequence[float]) -> Figure:
    """各图上下叠放，共用横轴，高度成比例。"""
    figure = new_figure(_STACKED_WIDTH, _STACKED_HEIGHT)
    ratios = {"height_ratios": heights}
    _draw_all(figure.subplots(len(charts), sharex=True, gridspec_kw=ratios), charts)
    for axes in figure.axes[:-1]:
        axes.set_xlabel("")
    return figure


def _draw_all(places: Sequence[Any], charts: Sequence[Chart]) -> None:
    for index, (axes, chart) in enumerate(zip(places, charts, strict=True)):
        _draw(axes, chart, legend=index == 0)


def _draw(axes: Any, chart: Chart, legend: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    lines = [line.drawable(chart.log) for line in chart.lines]
    lines = [line for line in lines if len(line.x)]
    for name, low, high in chart.bands:
        axes.axhspan(low, high, color="gray", alpha=0.15, label=name)
    for name, height in chart.levels:
        axes.axhline(height, color="gray", linestyle="--", linewidth=1, label=name)
    for line in lines:
        color = line.color if isinstance(line.color, str) else f"C{line.color}"
        style = "o-" if line.kind == "points" else "-"
        alpha = 0.3 if line.kind == "faint" else 1.0
        label = line.name or "_nolegend_"
        axes.plot(line.x, line.y, style, color=color, alpha=alpha, markersize=3.5, label=label)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(chart, value)))
    axes.grid(alpha=0.3)
    if lines:
        axes.set_ylim(*y_range(chart, lines))
    if legend and any(line.name for line in lines):
        axes.legend(fontsize=8)


def _tick(chart: Chart, value: float) -> str:
    return short(value) if chart.second is None else f"{short(value)}\n{chart.second(value)}"

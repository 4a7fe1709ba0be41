"""折线图（training/chart.py 的那种）画成一张 PNG。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.viz.chart import Chart, short, y_range

from .picture import new_figure, write_picture

_WIDTH, _HEIGHT = 7.5, 5.0


def draw_charts(charts: Sequence[Chart], path: Path) -> None:
    """各图并排，图例在第一张。

    Raises:
        FileExistsError: 文件已存在。
    """
    figure = new_figure(_WIDTH * len(charts), _HEIGHT)
    for index, (axes, chart) in enumerate(
        zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True)
    ):
        _draw(axes, chart, legend=index == 0)
    write_picture(figure, path)


def _draw(axes: Any, chart: Chart, legend: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    lines = [line.drawable(chart.log) for line in chart.lines]
    lines = [line for line in lines if len(line.x)]
    for line in lines:
        color = line.color if isinstance(line.color, str) else f"C{line.color}"
        style = "o-" if line.kind == "points" else "-"
        alpha = 0.3 if line.kind == "faint" else 1.0
        label = line.name or "_nolegend_"
        axes.plot(line.x, line.y, style, color=color, alpha=alpha, markersize=3.5, label=label)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(alpha=0.3)
    if lines:
        axes.set_ylim(*y_range(chart, lines))
    if legend and any(line.name for line in lines):
        axes.legend(fontsize=8)

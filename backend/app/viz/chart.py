"""折线图：一份数据，画成内联 SVG，不含脚本。

自己写 SVG 而不用 matplotlib：它要在训练途中画，导入 matplotlib 既占时间又占内存。
N 一条线的点数。
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 8, 46
_MOST_POINTS = 1000
_COLORS = 8
# 更大（对数轴上还有更小）的数当作画不出：两端之比会溢出。
_HUGE = 1e30

Kind = Literal["line", "faint", "points"]


@dataclass(frozen=True)
class Line:
    """一条线。name 为空的不进图例；faint 的不参与定纵轴的范围（原始损失的尖峰不该压扁整张图）。

    Attributes:
        x, y: (N,)，x 不减；不是有限数的点不画。
        color: 调色板里的号，或 CSS 颜色。
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int | str = 0
    kind: Kind = "line"

    @property
    def paint(self) -> str:
        return self.color if isinstance(self.color, str) else f"var(--c{self.color % _COLORS})"

    def drawable(self, log: bool) -> Line:
        """去掉画不出的点，抽稀。"""
        x, y = np.asarray(self.x, dtype=float), np.asarray(self.y, dtype=float)
        good = np.isfinite(x) & (np.abs(y) < _HUGE) & ((y > 1 / _HUGE) | (not log))
        x, y = downsample(x[good], y[good])
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Chart:
    """几条线、两条轴。

    Attributes:
        second: 横轴每个刻度下的第二行字。
        levels: 水平的参考线 (名字, 高度)；不参与定范围。
        bands: 水平的带 (名字, 下, 上)；不参与定范围。
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log: bool = False
    second: Callable[[float], str] | None = None
    levels: tuple[tuple[str, float], ...] = ()
    bands: tuple[tuple[str, float, float], ...] = ()


def short(value: float) -> str:
    """刻度上的数：0.25、1500 -> 1.5K、2.5M。"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def downsample(x: np.ndarray, y: np.ndarray, most: int = _MOST_POINTS) -> tuple[np.ndarray, ...]:
    """每段留最小与最大的那两点，所以尖峰不会被抽掉；至多 most 点。"""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(int)
    keep = set()
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = y[low:high]
        keep |= {low + int(part.argmin()), low + int(part.argmax())}
    index = np.array(sorted(keep))
    return x[index], y[index]


def smooth(values: np.ndarray) -> np.ndarray:
    """指数平均，去掉起点的偏差（Adam 式修正）；窗口约为总长的五十分之一。"""
    keep = 1.0 - 1.0 / max(2.0, len(values) / 50)
    result, mean, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result[index] = mean / weight
    return result


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """[low, high] 里 1、2、5 乘十的幂的整数倍。"""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.76)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """十的幂；不足三个时添上 2 与 5 倍。"""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [m * 10.0**p for p in powers for m in parts if low <= m * 10.0**p <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


def figure(chart: Chart) -> str:
    """一张图的 HTML：标题、图例、SVG。没有点可画时只有一句话。"""
    lines = [line.drawable(chart.log) for line in chart.lines]
    lines = [line for line in lines if len(line.x)]
    title = html.escape(chart.title)
    if not lines:
        return f"<figure><figcaption>{title}</figcaption><p>nothing measured yet</p></figure>"
    legend = "".join(
        f'<span><i class="{line.kind}" style="background:{html.escape(line.paint)}"></i>'
        f"{html.escape(line.name)}</span>"
        for line in lines
        if line.name
    )
    aside = [("level", name) for name, _ in chart.levels]
    aside += [("band", name) for name, *_ in chart.bands]
    legend += "".join(
        f'<span><i class="{kind}"></i>{html.escape(name)}</span>' for kind, name in aside
    )
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<div class="legend">{legend}</div>{_svg(chart, lines)}</figure>'
    )


def y_range(chart: Chart, lines: list[Line]) -> tuple[float, float]:
    """纵轴的两端，留一点白；一条平线也有高度。"""
    counted = [line.y for line in lines if line.kind != "faint"] or [line.y for line in lines]
    low, high = min(y.min() for y in counted), max(y.max() for y in counted)
    if chart.log:
        pad = max(1.15, (high / low) ** 0.05)
        return float(low / pad), float(high * pad)
    size = max(abs(low), abs(high))
    flat = high - low <= max(1e-9 * size, 1 / _HUGE)
    pad = 0.05 * (max(size, 1e-9) if flat else high - low)
    bottom = low - pad
    return float(0.0 if low >= 0 > bottom else bottom), float(high + pad)


def _svg(chart: Chart, lines: list[Line]) -> str:
    left, right = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    # 两边留一点，边上的圆点才不被切掉一半。
    edge = 0.012 * (right - left) if right > left else 0.5
    left, right = left - edge, right + edge
    low, high = y_range(chart, lines)
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bend = np.log10 if chart.log else np.asarray
    bottom, top = float(bend(low)), float(bend(high))

    def place_x(x: np.ndarray) -> np.ndarray:
        return (x - left) / (right - left) * wide

    def place_y(y: np.ndarray) -> np.ndarray:
        return (1 - (bend(y) - bottom) / (top - bottom)) * tall

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for tick in log_ticks(low, high) if chart.log else nice_ticks(low, high):
        y = _TOP + float(place_y(np.array(tick)))
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}h{wide}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in nice_ticks(left, right, 6):
        x = _LEFT + float(place_x(np.array(tick)))
        anchor = "middle" if x < _WIDTH - 30 else "end"
        labels = [short(tick)] + ([chart.second(tick)] if chart.second else [])
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}v{tall}"/>')
        parts += [
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 14 + 12 * row}" '
            f'text-anchor="{anchor}">{html.escape(label)}</text>'
            for row, label in enumerate(labels)
        ]
    parts.append(
        f'<text x="{_LEFT + wide / 2}" y="{_HEIGHT - 4}" text-anchor="middle">'
        f"{html.escape(chart.x_label)}</text>"
        f'<text transform="translate(12 {_TOP + tall / 2})rotate(-90)" text-anchor="middle">'
        f"{html.escape(chart.y_label)}</text>"
        f'<svg x="{_LEFT}" y="{_TOP}" width="{wide}" height="{tall}">'
    )
    for name, under, over in chart.bands:
        y, end = (float(place_y(np.array(edge))) for edge in (over, under))
        parts.append(
            f'<rect class="band" y="{y:.1f}" width="{wide}" height="{end - y:.1f}">'
            f"<title>{html.escape(name)}</title></rect>"
        )
    for name, height in chart.levels:
        y, name = float(place_y(np.array(height))), html.escape(name)
        parts.append(
            f'<path class="level" d="M0 {y:.1f}h{wide}"><title>{name}</title></path>'
            f'<text x="{wide - 4}" y="{y - 4:.1f}" text-anchor="end">{name}</text>'
        )
    for line in lines:
        parts += _draw(line, place_x(line.x), place_y(line.y))
    return "".join(parts) + "</svg></svg>"


def _draw(line: Line, x: np.ndarray, y: np.ndarray) -> list[str]:
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]
    style = f'style="stroke:{html.escape(line.paint)}"'
    name = f"<title>{html.escape(line.name)}</title>" if line.name else ""
    parts = [f'<path class="{line.kind}" {style} d="M{"L".join(points)}">{name}</path>']
    # 只有一点的线看不见，所以也画成圆点。
    if line.kind == "points" or len(points) == 1:
        fill = f'style="fill:{html.escape(line.paint)}"'
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" {fill}>'
            f"<title>{html.escape(line.name)} {value:.4f} at {short(at)}</title></circle>"
            for a, b, at, value in zip(x, y, line.x, line.y, strict=True)
        ]
    return parts

"""图：刻度、抽稀、范围、转义；坏的数画不出，也不毁掉图。"""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.viz.chart import Chart, Line, downsample, figure, log_ticks, nice_ticks, short, y_range

_FINITE = st.floats(-1e9, 1e9)


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text[text.index("<svg") : text.rindex("</svg>") + 6])


def drawn(*lines: Line, log: bool = False, **more: object) -> str:
    return figure(Chart("t", "x", "y", lines, log=log, **more))  # type: ignore[arg-type]


@given(st.lists(_FINITE, min_size=1, max_size=3000), st.integers(2, 400))
def test_downsampling_keeps_the_extremes(values: list[float], most: int) -> None:
    y = np.array(values)
    x, kept = downsample(np.arange(len(y), dtype=float), y, most)
    assert len(kept) <= max(most, 2) and len(x) == len(kept)
    assert kept.max() == y.max() and kept.min() == y.min()
    assert np.all(np.diff(x) > 0) and np.all(y[x.astype(int)] == kept)


@given(_FINITE, st.floats(1e-6, 1e9))
def test_ticks_are_inside_and_few(low: float, width: float) -> None:
    high = low + width
    if high == low or width < 1e-9 * abs(low):
        return
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    slack = 1e-6 * width
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@given(st.floats(1e-12, 1e9), st.floats(1.5, 1e9))
def test_log_ticks_are_inside_and_few(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 12 and all(low <= tick <= low * ratio for tick in ticks)


def test_ticks_by_hand() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert nice_ticks(0, 900, 6) == [0, 200, 400, 600, 800]
    assert log_ticks(0.01, 10) == pytest.approx([0.01, 0.1, 1, 10])
    assert [short(v) for v in (0, 0.25, 1500, 2.5e6, -3e9)] == ["0", "0.25", "1.5K", "2.5M", "-3B"]


@given(st.lists(st.floats(allow_nan=True), max_size=50), st.booleans(), st.booleans())
def test_any_numbers_give_a_drawing(values: list[float], log: bool, points: bool) -> None:
    y = np.array([v if abs(v) < 1e300 else math.inf for v in values])
    line = Line("a", np.arange(len(y)), y, kind="points" if points else "line")
    text = drawn(line, log=log)
    if "<svg" in text:
        numbers = " ".join(
            value for part in svg(text).iter() for key, value in part.items() if key != "style"
        )
        assert not re.search(r"\b(nan|inf)\b", numbers)


def test_points_are_where_they_belong() -> None:
    """两点的线：从左下到右上；纵轴朝上。"""
    text = drawn(Line("a", np.array([0.0, 10.0]), np.array([1.0, 3.0])))
    (path,) = [p for p in svg(text).iter("path") if p.get("class") == "line"]
    (x0, y0), (x1, y1) = re.findall(r"([\d.]+) ([\d.]+)", path.get("d", ""))
    wide = 640 - 58 - 10
    # 两边各留 1.2%，圆点不被切掉。
    edge = wide * 0.012 / 1.024
    assert float(x0) == pytest.approx(edge, abs=0.06)
    assert float(x1) == pytest.approx(wide - edge, abs=0.06)
    assert float(y0) > float(y1)
    # 范围 [0.9, 3.1]，所以两点离边各 0.1 / 2.2。
    tall = 300 - 8 - 46
    assert float(y1) == pytest.approx(tall * 0.1 / 2.2, abs=0.06)
    assert float(y0) == pytest.approx(tall * 2.1 / 2.2, abs=0.06)


def test_levels_and_bands_are_drawn_and_named() -> None:
    """带与线不定范围；线上写着名字，图例里各有一项，淡的线在图例里也淡。"""
    y = np.array([1.0, 3.0])
    line, faint = Line("a", np.arange(2.0), y), Line("b", np.arange(2.0), y, kind="faint")
    text = drawn(line, faint, levels=(("floor", 2.0),), bands=(("start", 2.5, 3.5),))
    (rect,) = [r for r in svg(text).iter("rect") if r.get("class") == "band"]
    tall = 300 - 8 - 46
    assert float(rect.get("y", "")) == pytest.approx(tall * (3.1 - 3.5) / 2.2, abs=0.06)
    assert float(rect.get("height", "")) == pytest.approx(tall * 1.0 / 2.2, abs=0.06)
    assert "floor" in [t.text for t in svg(text).iter("text")]
    for kind in ("level", "band", "faint", "line"):
        assert f'<i class="{kind}"' in text
    assert "floor</span>" in text and "start</span>" in text


def test_a_spike_of_the_raw_loss_does_not_set_the_range() -> None:
    x = np.arange(3.0)
    smooth, raw = Line("s", x, np.array([3.0, 2.0, 1.0])), np.array([3.0, 400.0, 1.0])
    lines = [smooth, Line("r", x, raw, kind="faint")]
    assert y_range(Chart("", "", "", ()), lines)[1] < 4
    assert y_range(Chart("", "", "", ()), [lines[1]])[1] > 400


def test_texts_are_escaped() -> None:
    bad = '<script>alert("1")</script>'
    line = Line(bad, np.arange(3.0), np.ones(3), color='red"><script>', kind="points")
    chart = Chart(bad, bad, bad, (line,), second=lambda at: bad, levels=((bad, 1.0),))
    text = figure(chart)
    assert "<script" not in text and text.count("&lt;script&gt;") > 5
    svg(text)


def test_nothing_to_draw_is_said() -> None:
    assert "nothing measured yet" in drawn()
    assert "nothing measured yet" in drawn(Line("a", np.ones(2), np.array([-1.0, 0.0])), log=True)

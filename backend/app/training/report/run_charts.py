"""一次训练的各张图：report.html 里的，loss.png 是其中的头两张。

N 步数。
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from app.common.files import write_atomic
from app.viz.chart import Chart, Line, short, smooth

from ..step import INITIAL_LOSS_OFF
from .history import History
from .metrics import METRICS
from .run_facts import Facts, read_facts

PLOT = "loss.png"
_SPEED_POINTS = 200
_EXPERT_CHARTS = (
    ("max_vio", "Busiest expert", "load over the mean - 1"),
    ("entropy", "Balance of the experts", "entropy of the load, 1 = even"),
    ("drop_rate", "Dropped by capacity", "part of the choices"),
    ("dead", "Experts without a token", "in one step"),
)


def plot_losses(run: Path) -> Path | None:
    """画损失与学习率；还没有一步可画时返回 None。matplotlib 只在这里导入。

    Raises:
        ValueError: facts.json 读不懂。
        OSError: 写不下。
    """
    history = History(run / METRICS)
    history.refresh()
    if not np.isfinite(history.column("loss")).any():
        return None
    from app.viz.curves import stacked
    from app.viz.picture import png

    loss, rate, *_ = charts(history, read_facts(run))
    write_atomic(run / PLOT, png(stacked((loss, rate), heights=(3, 1))))
    return run / PLOT


def charts(history: History, facts: Facts | None) -> list[Chart]:
    """报告里的图，按次序。"""
    step = history.column("step")
    tokens = history.column("tokens")
    loss, norm, rate = (history.column(name) for name in ("loss", "grad_norm", "lr"))

    def as_tokens(at: float) -> str:
        """步数 -> 词元数；批大小可能在续训时变过，所以按记下的累计数内插。"""
        if not len(step) or at > step[-1] or at < 0:
            return ""
        return short(float(np.interp(at, np.append(0.0, step), np.append(0.0, tokens))))

    def chart(title: str, y_label: str, *lines: Line, **more: Any) -> Chart:
        label = "optimizer step; second row: tokens"
        return Chart(title, label, y_label, lines, second=as_tokens, **more)

    good = np.isfinite(loss)
    at, val = history.evals()
    levels, bands = [], []
    if facts is not None:
        start, far = facts.expected_loss, INITIAL_LOSS_OFF
        name = f"expected before training: {start:.3f} ± {far:g}"
        bands.append((name, start - far, start + far))
    if facts is not None and facts.unigram is not None:
        levels.append((f"token frequencies alone: {facts.unigram:.3f}", facts.unigram))
    memory = history.of("memory")
    experts = [
        chart(title, label, *_expert_lines(history, name))
        for name, title, label in _EXPERT_CHARTS
        if history.of("moe")
    ]
    return [
        chart(
            "Loss", "nats per token",
            Line("training", step[good], loss[good], 0, "faint"),
            Line("training, smoothed", step[good], smooth(loss[good]), 0),
            Line(_validation_name(at, val), at, val, 1, "points"),
            levels=tuple(levels), bands=tuple(bands),
        ),
        chart("Learning rate", "", Line("", step, rate, 2)),
        chart("Gradient norm", "before clipping", Line("", step, norm, 3), log=True),
        chart("Gradient norm by layer", "before clipping", *_group_lines(history), log=True),
        *experts,
        chart("Speed", "tokens/s", Line("", *speeds(history), 4)),
        chart("Peak memory", "GiB", *_memory_lines(memory)),
    ]  # fmt: skip


def _validation_name(at: np.ndarray, val: np.ndarray) -> str:
    if not len(val):
        return "validation"
    best = int(val.argmin())
    return f"validation, best {val[best]:.4f} at step {at[best]:.0f}"


def speeds(history: History, most: int = _SPEED_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(步, 词元每秒)，每段内词元之和除以秒之和；不含验证与保存的时间。"""
    step, seconds = history.column("step"), history.column("seconds")
    tokens = np.diff(history.column("tokens"), prepend=0.0)
    # 从别处的检查点分出来的训练，第一行的累计数里有前一个训练的词元。
    good = np.isfinite(tokens) & (seconds > 0)
    good[:1] &= step[:1] == 1
    step, tokens, seconds = step[good], tokens[good], seconds[good]
    if not len(step):
        return step, step
    cuts = np.unique(np.linspace(0, len(step), min(most, len(step)) + 1).astype(int))[:-1]
    last = np.append(cuts[1:], len(step)) - 1
    return step[last], np.add.reduceat(tokens, cuts) / np.add.reduceat(seconds, cuts)


def _group_lines(history: History) -> Iterable[Line]:
    rows = [row for row in history.of("groups") if isinstance(row.get("norms"), dict)]
    yield from _layer_lines([(row["step"], row["norms"]) for row in rows])


def _expert_lines(history: History, name: str) -> Iterable[Line]:
    """每个 MoE 层一条线。"""
    rows = [row for row in history.of("moe") if isinstance(row.get("layers"), dict)]
    yield from _layer_lines(
        [
            (row["step"], {f"block {i}": one.get(name) for i, one in row["layers"].items()})
            for row in rows
        ]
    )


def _layer_lines(rows: list[tuple[int, dict[str, Any]]]) -> Iterable[Line]:
    """rows 是 (步, {名字: 值})。各块由浅到深一串渐变的颜色；块多时图例只写首尾两块。"""
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    blocks = [name for name in names if name.startswith("block ")]
    named = set(blocks) if len(blocks) <= 6 else {blocks[0], blocks[-1]}
    others = 0
    for name in names:
        seen = [(step, values[name]) for step, values in rows if name in values]
        points = np.array([(s, np.nan if v is None else v) for s, v in seen], dtype=float)
        color: int | str
        if name in blocks:
            part = blocks.index(name) / max(1, len(blocks) - 1)
            color = f"hsl({200 + 130 * part:.0f} 65% 55%)"
        else:
            color, others = 1 + others, others + 1
        shown = name if name not in blocks or name in named else ""
        yield Line(shown, points[:, 0], points[:, 1], color)


def _memory_lines(rows: list[dict[str, Any]]) -> Iterable[Line]:
    for color, (key, name) in enumerate((("resident", "process"), ("device", "device"))):
        seen = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int)]
        if seen:
            points = np.array(seen, dtype=float)
            yield Line(name, points[:, 0], points[:, 1] / 2**30, color, "points")

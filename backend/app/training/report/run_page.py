"""report.html：训练途中就能打开的一页。全部由训练文件夹里的文件得来，随时可以重写。

N 步数。
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from app.common.files import write_atomic
from app.viz.chart import Chart, Line, figure, short
from app.viz.html_page import page, table
from app.viz.loss_plot import smooth

from ..config import TrainConfig
from ..saving.resume import RUN_FILE, flat
from ..step import INITIAL_LOSS_OFF
from .history import History
from .metrics import METRICS
from .run_facts import Facts, read_facts

REPORT = "report.html"

# 画一次用去 t 秒，之后至少训练这么多倍的 t 才再画：至多占百分之二的时间。
_REST = 50.0
_MOST_SAMPLES, _MOST_EVENTS = 24, 200
_SPEED_POINTS = 200
_EXPERT_CHARTS = (
    ("max_vio", "Busiest expert", "load over the mean - 1"),
    ("entropy", "Balance of the experts", "entropy of the load, 1 = even"),
    ("drop_rate", "Dropped by capacity", "part of the choices"),
    ("dead", "Experts without a token", "in one step"),
)
_QUIET_KINDS = {"eval", "sample", "memory", "groups", "moe"}


class Reporter:
    """随训练重画报告；画得慢（步数极多）就少画。"""

    name = REPORT

    def __init__(self, run: Path) -> None:
        self._run, self._history = run, History(run / METRICS)
        self._next = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """一切都从文件里读，不必看每一行。"""

    def sync(self) -> None:
        begin = time.perf_counter()
        if begin < self._next:
            return
        write_report(self._run, self._history)
        now = time.perf_counter()
        self._next = now + _REST * (now - begin)

    def close(self) -> None:
        write_report(self._run, self._history)


def write_report(run: Path, history: History | None = None) -> Path:
    """（重）写 run 的报告；history 是已读过一部分的历史，接着读。

    Raises:
        OSError: 写不下。
    """
    history = History(run / METRICS) if history is None else history
    history.refresh()
    facts, problems = _facts(run)
    settings, more = _settings(run)
    problems += more
    name = run.resolve().name
    steps = facts.steps if facts else None
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="soft">{html.escape(_status(history, steps))}</p>',
        '<div class="charts">',
        *(figure(chart) for chart in charts(history, facts)),
        "</div>",
        *_events(history, (facts.notes if facts else []) + problems),
        *_samples(history.of("sample")),
    ]
    if facts:
        body += ["<h2>What runs, and why</h2>", table(facts.plan)]
    if settings:
        marked = [i for i, (key, value, usual) in enumerate(settings) if value != usual]
        body += [
            "<h2>Configuration</h2><p class=soft>Marked: not the default.</p>",
            table(settings, ("setting", "value", "default"), marked),
        ]
    write_atomic(run / REPORT, page(f"{name}: training report", body))
    return run / REPORT


def _facts(run: Path) -> tuple[Facts | None, list[str]]:
    try:
        return read_facts(run), []
    except ValueError as error:
        return None, [str(error)]


def _settings(run: Path) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(设置, 值, 默认值)；读不懂的设置文件成为一条提醒。"""
    import yaml

    path = run / RUN_FILE
    if not path.is_file():
        return [], []
    try:
        config = TrainConfig.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        return [], [f"{path} cannot be read: {error}"]
    usual = dict(flat(TrainConfig().to_dict()))
    return [(key, str(value), str(usual.get(key))) for key, value in flat(config.to_dict())], []


def _status(history: History, steps: int | None) -> str:
    done = history.last_step
    parts = [f"step {done:,}" + (f" of {steps:,}" if steps else "")]
    if done:
        parts.append(f"{short(float(np.nan_to_num(history.column('tokens')[-1])))} tokens")
        speed = speeds(history)[1]
        if len(speed):
            parts.append(f"{float(np.median(speed)):,.0f} tokens/s")
    at, losses = history.like_evals()
    if len(losses):
        best = int(losses.argmin())
        parts.append(f"best validation loss {losses[best]:.4f} at step {at[best]:.0f}")
        parts.append(f"newest {losses[-1]:.4f} at step {at[-1]:.0f}")
    bad = len(history.of("skipped"))
    if bad:
        parts.append(f"{bad} steps skipped")
    return " · ".join(parts)


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
            Line("validation", at, val, 1, "points"),
            levels=tuple(levels), bands=tuple(bands),
        ),
        chart("Learning rate", "", Line("", step, rate, 2)),
        chart("Gradient norm", "before clipping", Line("", step, norm, 3), log=True),
        chart("Gradient norm by layer", "before clipping", *_group_lines(history), log=True),
        *experts,
        chart("Speed", "tokens/s", Line("", *speeds(history), 4)),
        chart("Peak memory", "GiB", *_memory_lines(memory)),
    ]  # fmt: skip


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


def _events(history: History, notes: list[str]) -> list[str]:
    """提醒、跳过的步与其它少见的行；太多时只留最近的。"""
    rows = [row for row in history.others if row.get("kind") not in _QUIET_KINDS]
    texts = [("", note) for note in notes] + [(f"step {row['step']}", _event(row)) for row in rows]
    if not texts:
        return ["<h2>Warnings</h2><p>none</p>"]
    left = len(texts) - _MOST_EVENTS
    said = f"<p>{left} earlier ones are in {METRICS}</p>" if left > 0 else ""
    return ["<h2>Warnings</h2>", said, table(texts[-_MOST_EVENTS:])]


def _event(row: dict[str, Any]) -> str:
    if row.get("kind") == "skipped":
        return f"no update: {row.get('where')}; rows {row.get('rows')}"
    if row.get("kind") == "spike":
        said = f"A spike: the {row.get('where')}. The weights were updated all the same"
        return f"{said}; the windows read start at tokens {_listed(row.get('rows'))}."
    if row.get("kind") == "hint":
        return str(row.get("text"))
    facts = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("kind", "step"))
    return f"{row.get('kind')}: {facts}"


def _listed(rows: Any) -> str:
    return ", ".join(map(str, rows)) if isinstance(rows, list) else "unknown"


def _samples(rows: list[dict[str, Any]]) -> list[str]:
    """首尾都在、均匀抽取的样文，新的在前。"""
    if not rows:
        return []
    pick = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_SAMPLES)).astype(int))
    parts = ["<h2>Samples</h2>"]
    for index in reversed(pick.tolist()):
        step, text = rows[index]["step"], html.escape(str(rows[index].get("text")))
        is_open = " open" if index == len(rows) - 1 else ""
        parts.append(
            f"<details{is_open}><summary>step {step:,}</summary><pre>{text}</pre></details>"
        )
    return parts

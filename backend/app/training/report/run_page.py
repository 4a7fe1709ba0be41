"""report.html：训练途中就能打开的一页。全部由训练文件夹里的文件得来，随时可以重写。

N 步数。
"""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

import numpy as np

from app.common.files import write_atomic
from app.viz.chart import figure, short
from app.viz.html_page import page, table

from ..config import TrainConfig, flat
from ..saving.resume import RUN_FILE
from .history import History
from .metrics import METRICS
from .run_charts import charts, speeds
from .run_facts import Facts, read_facts
from .tuned import tuned_of, tuned_section

REPORT = "report.html"

# 画一次用去 t 秒，之后至少训练这么多倍的 t 才再画：至多占百分之二的时间。
_REST = 50.0
_MOST_SAMPLES, _MOST_EVENTS = 24, 200
_QUIET_KINDS = {"eval", "sample", "memory", "groups", "moe", "answers"}


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
        *(tuned_section(tuned_of(history, facts)) if _is_tuned(settings) else []),
        *_events(history, (facts.notes if facts else []) + problems),
        *_samples(history.of("sample")),
    ]
    if facts:
        body += ["<h2>What runs, and why</h2>", table(facts.decisions)]
    if settings:
        marked = [i for i, (key, value, usual) in enumerate(settings) if value != usual]
        body += [
            "<h2>Configuration</h2><p class=soft>Marked: not the default.</p>",
            table(settings, ("setting", "value", "default"), marked),
        ]
    write_atomic(run / REPORT, page(f"{name}: training report", body))
    return run / REPORT


def _is_tuned(settings: list[tuple[str, str, str]]) -> bool:
    return any(key == "init_from" and value != "None" for key, value, _ in settings)


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

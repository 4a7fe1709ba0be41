"""一次微调得到了什么：训练了多少参数、计分的词元、各验证集前后的损失、答完的回答、DPO 的两个数。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.viz.chart import short
from app.viz.html_page import table

from ..settings.data import OWN
from .history import History
from .run_facts import Facts

Rows = list[tuple[str, str, str]]
_NUMBERS = {
    "margin": "reward margin", "accuracy": "preferred the chosen answer",
    "chosen": "log-probability, chosen", "rejected": "log-probability, rejected",
}  # fmt: skip


@dataclass(frozen=True)
class Losses:
    """一个验证集：训练之前、最好的、最后的损失；没有则 NaN。"""

    before: float
    best: float
    last: float


@dataclass(frozen=True)
class Tuned:
    """
    Attributes:
        scored: 训练里计分的词元（DPO：对）；read：读过的词元。
        sets: {验证集: 损失}，第一个决定 best。
        numbers: {DPO 的一个数: (之前, 最后)}。
        answers: 最后一次答题的那一行。
    """

    trained: int | None
    parameters: int | None
    scored: float
    read: float
    sets: dict[str, Losses]
    numbers: dict[str, tuple[float, float]]
    answers: dict[str, Any] | None


def tuned_of(history: History, facts: Facts | None) -> Tuned:
    evals, answers = history.of("eval"), history.of("answers")
    losses: dict[str, list[tuple[int, float]]] = {}
    for row in evals:
        one = {row.get("set", OWN): row} | row.get("sets", {})
        for name, found in one.items():
            losses.setdefault(name, []).append((row["step"], _number(found.get("loss"))))
    pairs = {}
    if evals:
        ends = evals[0], evals[-1]
        pairs = {
            name: (_number(ends[0].get(name)), _number(ends[1].get(name)))
            for name in _NUMBERS
            if name in ends[1]
        }
    tokens, scored = history.column("tokens"), history.column("scored")
    return Tuned(
        trained=None if facts is None else facts.trained,
        parameters=None if facts is None else facts.parameters,
        scored=float(np.nansum(scored)) if np.isfinite(scored).any() else math.nan,
        read=float(tokens[-1]) if len(tokens) else math.nan,
        sets={name: _losses(found) for name, found in losses.items()},
        numbers=pairs,
        answers=answers[-1] if answers else None,
    )


def tuned_rows(tuned: Tuned) -> Rows:
    """(项目, 值, 说明)。"""
    rows: Rows = []
    if tuned.trained is not None and tuned.parameters:
        share = 100 * tuned.trained / tuned.parameters
        of = f"of {tuned.parameters:,} parameters ({share:.3g}%)"
        rows.append(("trained", f"{tuned.trained:,}", of))
    if not math.isnan(tuned.scored):
        what = "pairs scored" if tuned.numbers else "tokens scored"
        rows.append((what, short(tuned.scored), f"of {short(tuned.read)} places in the rows read"))
    for number, (name, one) in enumerate(tuned.sets.items()):
        rows.append((f"loss on {name}", arrow(one), _change(one, deciding=number == 0)))
    for name, (before, last) in tuned.numbers.items():
        said = "falls in most runs: the difference counts" if name == "chosen" else ""
        rows.append((_NUMBERS[name], f"{before:.4g} -> {last:.4g}", said))
    if tuned.answers is not None:
        rows.append(("answers ended by themselves", ended(tuned), _exact(tuned.answers)))
    return rows


def tuned_section(tuned: Tuned) -> list[str]:
    """报告里的一节，连同几个回答。"""
    parts = ["<h2>Fine-tuning</h2>", table(tuned_rows(tuned))]
    if tuned.answers is not None:
        shown = [(str(one["asked"]), str(one["said"])) for one in tuned.answers["shown"]]
        parts += [table(shown, ("asked", "said"))]
    return parts


HEAD = ("run", "trained", "scored", "tuned data", "old data", "answers ended", "margin", "accuracy")


def compared(label: str, runs: Sequence[Tuned]) -> tuple[str, ...]:
    """HEAD 的一行；种子多于一个时是头一个的，散布在另一张表里。"""
    one = runs[0]
    deciding, *others = one.sets.values() or [Losses(math.nan, math.nan, math.nan)]
    margin, accuracy = (one.numbers.get(name) for name in ("margin", "accuracy"))
    return (
        label,
        "-" if one.trained is None else f"{one.trained:,}",
        "-" if math.isnan(one.scored) else short(one.scored),
        arrow(deciding),
        arrow(others[0]) if others else "-",
        ended(one),
        "-" if margin is None else f"{margin[1]:.4g}",
        "-" if accuracy is None else f"{accuracy[1]:.0%}",
    )


def arrow(one: Losses) -> str:
    if math.isnan(one.before):
        return "-" if math.isnan(one.last) else f"{one.last:.4f}"
    return f"{one.before:.4f} -> {one.last:.4f}"


def ended(tuned: Tuned) -> str:
    row = tuned.answers
    return "-" if row is None else f"{row['ended']} of {row['asked']}"


def _exact(row: dict[str, Any]) -> str:
    said = f"greedy, within {row['limit']} tokens; {row['exact']} exactly the validation's answer"
    if row["ended"] < row["asked"] / 2:
        said += "; most do not stop: train longer, or look at the data with gpt2 prepare --show 3"
    return said


def _change(one: Losses, deciding: bool) -> str:
    if math.isnan(one.before) or math.isnan(one.last):
        return ""
    if deciding:
        worse = "; it rose again: the best checkpoint is RUN/best" if one.last > one.best else ""
        return f"best {one.best:.4f}{worse}"
    moved = one.last - one.before
    return f"{moved:+.4f}: " + ("forgotten" if moved > 0 else "nothing forgotten")


def _losses(found: list[tuple[int, float]]) -> Losses:
    before = [loss for step, loss in found if step == 0]
    after = [loss for step, loss in found if step > 0 and not math.isnan(loss)]
    none = math.nan
    return Losses(
        before[0] if before else none, min(after, default=none), after[-1] if after else none
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan

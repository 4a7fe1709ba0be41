"""几次训练放在一起看：表与曲线；只有种子不同的算作一组，报平均与散布。

N 步数。
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from app.common.tell import Tell
from app.common.units import duration
from app.models.transformer.settings.fields import Mark, marked
from app.viz.chart import Chart, Line, figure, short, smooth
from app.viz.html_page import page, table

from ..config import TrainConfig, flat
from ..saving.resume import RUN_FILE
from .history import History
from .metrics import METRICS
from .run_facts import Facts, read_facts
from .tuned import HEAD as TUNED_HEAD
from .tuned import Tuned, compared, tuned_of

# 不算作设置的差别：在哪里、怎样看着，不改变训练。
_ASIDE = marked(TrainConfig, Mark.ASIDE)

HEAD = (
    "run", "seeds", "best val", "final val", "tokens", "time", "tokens/s", "parameters", "steps",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedRun:
    """Attributes:
    settings: 带点的名字 -> 值。
    tokens, seconds: (N,) 做完每步时的累计；秒只计训练的步，不计验证、样文与保存。
    evals, val: 做过验证的步与损失。
    tuned: 由训练好的权重开始的才有。
    """

    name: str
    settings: dict[str, object]
    facts: Facts | None
    loss: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    evals: np.ndarray
    val: np.ndarray
    steps: int
    seconds_known: bool
    tuned: Tuned | None = None

    def at_evals(self, column: np.ndarray) -> np.ndarray:
        """验证那一刻的累计；第 0 步是 0。"""
        return np.append(0.0, column)[self.evals.astype(int)]


@dataclass(frozen=True)
class SeedGroup:
    """设置全同、只有种子不同的几次。"""

    label: str
    runs: tuple[TrainedRun, ...]


def load_run(folder: Path) -> TrainedRun:
    """
    Raises:
        ValueError: 没有这个文件夹、没有指标或运行文件，或它们读不懂。
    """
    import yaml

    if not (folder / METRICS).is_file() or not (folder / RUN_FILE).is_file():
        what = METRICS if not (folder / METRICS).is_file() else RUN_FILE
        raise ValueError(f"{folder} has no {what}: give run folders written by `gpt2 train`")
    try:
        data = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
        settings = dict(flat(TrainConfig.from_dict(data).to_dict()))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / RUN_FILE} cannot be read: {error}") from None
    history = History(folder / METRICS)
    history.refresh()
    step, seconds = history.column("step"), history.column("seconds")
    if not len(step):
        raise ValueError(f"{folder} has no finished training step yet: nothing to compare")
    # 从别处的检查点分出来的训练没有开头的行：那一段的时间不知道。
    whole = bool(step[0] == 1 and np.isfinite(seconds).all())
    evals, val = history.like_evals()
    known = (evals == 0) | np.isin(evals, step)
    size = int(step[-1]) + 1
    columns = {name: np.full(size, np.nan) for name in ("loss", "tokens", "seconds")}
    at = step.astype(int)
    columns["loss"][at] = history.column("loss")
    columns["tokens"][at] = history.column("tokens")
    columns["seconds"][at] = np.cumsum(np.nan_to_num(seconds))
    facts = read_facts(folder)
    return TrainedRun(
        name=str(folder),
        settings=settings,
        facts=facts,
        loss=columns["loss"][1:],
        tokens=columns["tokens"][1:],
        seconds=columns["seconds"][1:],
        evals=evals[known],
        val=val[known],
        steps=size - 1,
        seconds_known=whole,
        tuned=tuned_of(history, facts) if settings.get("init_from") is not None else None,
    )


def group_runs(runs: Sequence[TrainedRun]) -> list[SeedGroup]:
    """最好的在前（按各组最好验证损失的平均）；没有验证的在后。"""
    names = differing(runs)
    found: dict[tuple[object, ...], list[TrainedRun]] = {}
    for run in runs:
        found.setdefault(_identity(run), []).append(run)
    groups = [SeedGroup(_label(members, names), tuple(members)) for members in found.values()]
    if len({group.label for group in groups}) < len(groups):
        # 设置全同而数据不同：只有文件夹的名字分得开。
        groups = [SeedGroup(_label(group.runs, ()), group.runs) for group in groups]
    return sorted(groups, key=lambda group: _mean([best(run) for run in group.runs]))


def differing(runs: Sequence[TrainedRun]) -> list[str]:
    """各次取值不同的设置。"""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [
        name
        for name in names
        if name not in _ASIDE and len({repr(run.settings.get(name)) for run in runs}) > 1
    ]


def _identity(run: TrainedRun) -> tuple[object, ...]:
    shown = {name: repr(value) for name, value in run.settings.items() if name not in _ASIDE}
    return (*sorted(shown.items()), run.facts.data if run.facts else run.name)


def _label(runs: Sequence[TrainedRun], names: Sequence[str]) -> str:
    if names:
        return ", ".join(f"{name}={runs[0].settings.get(name)}" for name in names)
    return ", ".join(Path(run.name).name for run in runs)


def best(run: TrainedRun) -> float:
    """最好的验证损失；第 0 步的不算。没有则 NaN。"""
    val = run.val[run.evals > 0]
    return float(val.min()) if len(val) else math.nan


def final(run: TrainedRun) -> float:
    """最后一步的验证损失；那一步没有验证过则 NaN。"""
    return float(run.val[-1]) if len(run.val) and run.evals[-1] == run.steps else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.inf if any(map(math.isnan, values)) else fmean(values)


def with_spread(values: Sequence[float]) -> str:
    """平均 ± 样本标准差；一个值没有散布可言。"""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.4f}"
    return f"{fmean(known):.4f} ± {stdev(known):.4f}"


def row(group: SeedGroup) -> tuple[str, ...]:
    """HEAD 的一行；种子之间的词元、时间取平均。"""
    runs = group.runs
    tokens = fmean(float(run.tokens[-1]) for run in runs)
    timed = [float(run.seconds[-1]) for run in runs if run.seconds_known]
    parameters = {f"{run.facts.parameters:,}" for run in runs if run.facts}
    return (
        group.label,
        ", ".join(str(run.settings["seed"]) for run in runs),
        with_spread([best(run) for run in runs]),
        with_spread([final(run) for run in runs]),
        short(tokens),
        duration(fmean(timed)) if timed else "-",
        f"{tokens / fmean(timed):,.0f}" if timed else "-",
        " / ".join(sorted(parameters)) or "-",
        " / ".join(sorted({f"{run.steps:,}" for run in runs})),
    )


def tuning_rows(groups: Sequence[SeedGroup]) -> list[tuple[str, ...]]:
    """微调的各组，连表头；一组也没有就是空的。"""
    found = [(g.label, [run.tuned for run in g.runs if run.tuned]) for g in groups]
    rows = [compared(label, runs) for label, runs in found if runs]
    return [TUNED_HEAD, *rows] if rows else []


def settings_rows(groups: Sequence[SeedGroup], names: Sequence[str]) -> list[tuple[str, ...]]:
    """只有不同的设置：(名字, 每组的值...)。"""
    return [(name, *(str(group.runs[0].settings.get(name)) for group in groups)) for name in names]


def check_same_data(runs: Sequence[TrainedRun], tell: Tell) -> None:
    """数据不同，损失就不可比；只提醒，图照画。"""
    unknown = [run.name for run in runs if run.facts is None]
    if unknown:
        tell(f"warning: the data of {', '.join(unknown)} is not recorded: losses may not compare")
    known = {run.facts.data for run in runs if run.facts}
    if len(known) > 1:
        tell("warning: the runs were trained or validated on different data: losses do not compare")
    if len({run.settings["eval_batches"] for run in runs}) > 1:
        tell("warning: eval_batches differs: the runs were validated on different windows")
    unfinished = [run.name for run in runs if run.facts and run.steps < run.facts.steps]
    if unfinished:
        tell(f"warning: not finished: {', '.join(unfinished)}")


def compare_charts(groups: Sequence[SeedGroup]) -> list[Chart]:
    """横轴是词元、是时间的两张；种子同色，图例一次。"""
    kinds = (("tokens", "training tokens"), ("seconds", "seconds of training"))
    return [
        Chart(f"Loss over {name}", label, "nats per token", tuple(_lines(groups, name)))
        for name, label in kinds
    ]


def _lines(groups: Sequence[SeedGroup], axis: str) -> list[Line]:
    lines = []
    for color, group in enumerate(groups):
        for run in group.runs:
            if axis == "seconds" and not run.seconds_known:
                continue
            column = run.tokens if axis == "tokens" else run.seconds
            good = np.isfinite(run.loss) & np.isfinite(column)
            after = run.evals > 0
            name = group.label if run is group.runs[0] else ""
            val = Line(name, run.at_evals(column)[after], run.val[after], color, "points")
            train = Line("", column[good], smooth(run.loss[good]), color, "faint")
            # 没有验证的训练由训练损失代表。
            if not after.any():
                train = Line(name, train.x, train.y, color)
            lines += [train, val]
    return lines


def compare_page(groups: Sequence[SeedGroup], notes: Sequence[str]) -> bytes:
    """对照的网页。"""
    names = differing([run for group in groups for run in group.runs])
    body = [
        "<h1>Comparison</h1>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        table([row(group) for group in groups], HEAD, numbers=range(2, len(HEAD))),
        '<p class="soft">± is the sample standard deviation over seeds. Time counts training '
        "steps only. Dots: validation; faint: training loss, smoothed.</p>",
        '<div class="charts">',
        *(figure(chart) for chart in compare_charts(groups)),
        "</div>",
    ]
    if tuning := tuning_rows(groups):
        body += ["<h2>Fine-tuning</h2>", table(tuning[1:], tuning[0])]
    if names:
        labels = [f"{n}: {', '.join(r.name for r in g.runs)}" for n, g in enumerate(groups, 1)]
        body += [
            "<h2>What differs</h2>",
            table(settings_rows(groups, names), ("setting", *labels)),
        ]
    return page("Comparison of runs", body)

"""从哪里接着训练，以及配置变了还能不能接。"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.common.tell import Tell
from app.data.feed import Feed
from app.models.transformer.settings.fields import Mark, marked

from ..config import TrainConfig, flat
from ..optim.schedule import learning_rate
from .checkpoint import (
    CheckpointError,
    find_latest,
    is_clutter,
    list_steps,
    step_of,
    tell_extra,
    verify_checkpoint,
)
from .lock import LOCK

RUN_FILE = "run.yaml"
SILENT = marked(TrainConfig, Mark.SILENT)
# 决定优化器状态里有什么。
_STATE_SHAPE = ("optim.name", "tune.")


def check_out(config: TrainConfig) -> None:
    """在训练文件夹里写下任何东西之前调用：别人的文件绝不动。

    Raises:
        ValueError: 那里已有东西而没有要求续训，或那不是一个训练文件夹。
    """
    run = Path(config.out)
    if run.exists() and not run.is_dir():
        raise ValueError(f"out={config.out} is a file: give a folder")
    # 只剩锁文件：上一次在写下任何成果之前就失败了，照新文件夹看待。
    names = [path.name for path in run.iterdir()] if run.is_dir() else []
    # 数据也可以住在里面（gpt2 finetune）：它先于训练写好，不算已有的训练。
    data = Path(config.data.folder)
    inside = data.name if data.parent.resolve() == run.resolve() else LOCK
    if all(name in (LOCK, inside) or is_clutter(name) for name in names):
        return
    if config.resume == "none":
        raise ValueError(
            f"out={config.out} already exists and is never overwritten: use --resume auto to "
            "go on with it, or another --out"
        )
    if not ((run / RUN_FILE).is_file() or list_steps(run)):
        raise ValueError(f"out={run} holds other files and no run: use another --out")


def find_start(config: TrainConfig, tell: Tell) -> Path | None:
    """要续的检查点；None = 从头开始。

    Raises:
        ValueError: 要续的检查点不可用，或会盖住别的训练。
    """
    run = Path(config.out)
    if config.resume == "none":
        return None
    if config.resume == "auto":
        return _newest(run, tell)
    return _named(Path(config.resume), run, tell)


def _newest(run: Path, tell: Tell) -> Path | None:
    folder, skipped = find_latest(run)
    for item in skipped:
        tell(f"skipped {item.path.name}: {item.reason}")
    if folder is None and skipped:
        raise CheckpointError(
            f"{run} has no valid checkpoint, only the damaged ones named above: "
            "repair them or use another --out"
        )
    if folder is None:
        tell(f"nothing to resume in {run}: starting from the beginning")
    else:
        tell_extra(folder, tell)
    return folder


def _named(path: Path, run: Path, tell: Tell) -> Path:
    folder: Path | None = path
    if path.is_dir() and step_of(path) is None:
        folder, skipped = find_latest(path)
        for item in skipped:
            tell(f"skipped {item.path.name}: {item.reason}")
    if folder is None:
        raise CheckpointError(f"resume={path} holds no valid checkpoint")
    verify_checkpoint(folder)
    tell_extra(folder, tell)
    if folder.parent.resolve() == run.resolve():
        newest = list_steps(run)[-1][1]
        if newest.name != folder.name:
            raise ValueError(
                f"resume={path} but {run} already holds {newest.name}: use --resume auto, or "
                "another --out to branch off"
            )
    elif list_steps(run):
        raise ValueError(f"out={run} already exists: to branch off from {path} use a new --out")
    return folder


def check_compatible(state: Mapping[str, Any], config: TrainConfig, data: str, tell: Tell) -> None:
    """比较保存时与现在的配置和数据。

    Raises:
        ValueError: 模型的形状、优化器的种类或数据变了，点名两个值。其余的变化只警告。
    """
    if state["data"] != data:
        raise ValueError(
            f"the checkpoint was trained on data {state['data'][:12]} but data.folder="
            f"{config.data.folder} holds {data[:12]}: resume with the same data"
        )
    # 存下之后才有的设置：当时的行为就是它的默认值。
    before = dict(flat(TrainConfig().to_dict())) | dict(flat(state["config"]))
    now = dict(flat(config.to_dict()))
    free = marked(TrainConfig, Mark.FREE)
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or any(f"{name}.".startswith(f"{quiet}.") for quiet in SILENT):
            continue
        if name.startswith(_STATE_SHAPE) or (name.startswith("model.") and name not in free):
            raise ValueError(
                f"{name}={new!r} but the checkpoint has {old!r}: what it holds does not fit; "
                f"set it back to {old!r} or start a new run with another --out"
            )
        tell(f"warning: {name} changed from {old!r} to {new!r}: no exact continuation")


def check_same_machine(state: Mapping[str, Any], now: Mapping[str, Any], tell: Tell) -> None:
    """线程数与版本不同，结果的末位就会不同；只提醒。"""
    for name, value in now.items():
        if state.get(name) != value:
            tell(
                f"note: {name} was {state.get(name)!r}, now {value!r}: "
                "results may differ in the last bits"
            )


def windows_read(state: Mapping[str, Any]) -> int:
    """保存时读过的窗口数；早先的检查点没有这一项，那时第 step 步总从 step·B 读起。"""
    known = state.get("windows")
    return state["step"] * state["config"]["batch_size"] if known is None else known


def resume_lines(state: Mapping[str, Any], config: TrainConfig, feed: Feed) -> list[str]:
    """接着训之前要说清的：学习率在这一步从多少变到多少，数据从哪里读起。"""
    step, lines = state["step"], []
    kept = ("steps", "seed", "optim", "schedule")
    old = TrainConfig.from_dict({k: v for k, v in state["config"].items() if k in kept})
    for name, before, now in zip(
        ("learning rate", "learning rate of muon"), _peaks(old), _peaks(config), strict=True
    ):
        rates = [
            learning_rate(step, peak=peak, steps=of.steps, schedule=of.schedule)
            for peak, of in ((before, old), (now, config))
        ]
        if rates[0] != rates[1] and (name == "learning rate" or config.optim.name == "muon"):
            lines.append(
                f"warning: the {name} of the next step (step {step + 1}) is {rates[1]:.3g}; with "
                f"the settings of the checkpoint it was to be {rates[0]:.3g}"
            )
    done, within = divmod(feed.windows(step), feed.rows_in_epoch)
    lines.append(
        f"data goes on at window {within + 1:,} of {feed.rows_in_epoch:,} in pass {done + 1} "
        f"({feed.windows(step):,} windows of {feed.context} tokens were read)"
    )
    if old.seed != config.seed and within:
        lines.append(
            f"warning: seed {config.seed} draws the windows in another order than seed {old.seed}: "
            f"of pass {done + 1} some are read again and some not at all"
        )
    return lines


def _peaks(config: TrainConfig) -> tuple[float, float]:
    optim = config.optim
    return optim.lr, optim.lr if optim.muon_lr is None else optim.muon_lr

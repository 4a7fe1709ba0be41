"""TensorBoard 事件：没装就早说，写不了只提醒，续训之后每步恰有一个值。"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.training.report import tensorboard as module
from app.training.report.tensorboard import EVENTS, require_tensorboard

from ..conftest import Make, rows, train

installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed: pip install 'gpt2-workbench[tensorboard]'",
)


def test_a_missing_package_is_said_before_anything_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make(tensorboard=True)
    with pytest.raises(ImportError, match=r"pip install 'gpt2-workbench\[tensorboard\]'"):
        train(config)
    assert not Path(config.out).exists()


class Broken:
    """到第 n 次写时失败的写者。"""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def add_scalar(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("calls", [0, 7])
def test_failing_events_do_not_stop(
    make: Make, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """C8：一句提醒，训练照常。"""
    told: list[str] = []
    monkeypatch.setattr(
        "app.training.report.progress.Progress.tell", lambda self, text: told.append(text)
    )
    monkeypatch.setattr(module, "require_tensorboard", lambda: None)
    monkeypatch.setattr("app.training.run.require_tensorboard", lambda: None)

    def start(self: module.TensorBoard, run: Path, resume_step: int) -> None:
        self._writer = Broken(calls)  # type: ignore[assignment]

    monkeypatch.setattr(module.TensorBoard, "__init__", start)
    config = make(tensorboard=True, eval_every=2)
    assert train(config).step == 6
    assert len([text for text in told if "cannot write tensorboard" in text]) == 1
    assert [row["step"] for row in rows(config.out)] == [1, 2, 3, 4, 5, 6]


def test_an_unwritable_folder_is_one_warning(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        "app.training.report.progress.Progress.tell", lambda self, text: told.append(text)
    )
    monkeypatch.setattr("app.training.run.require_tensorboard", lambda: None)

    def start(self: module.TensorBoard, run: Path, resume_step: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.TensorBoard, "__init__", start)
    assert train(make(tensorboard=True)).step == 6
    assert len([text for text in told if "cannot write tensorboard" in text]) == 1


def one_value_a_step(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / EVENTS), size_guidance={"scalars": 0})
    events.Reload()
    for tag, kind, name in (
        ("loss/train", "train", "loss"),
        ("loss/validation", "eval", "loss"),
        ("learning rate", "train", "lr"),
    ):
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        wanted = [(row["step"], row[name]) for row in rows(run, kind)]
        assert [step for step, _ in seen] == [step for step, _ in wanted], tag
        assert [value for _, value in seen] == pytest.approx([value for _, value in wanted])
    assert "gradient/block 1" in events.Tags()["scalars"]


@installed
def test_each_step_has_one_value_over_resumes(make: Make) -> None:
    require_tensorboard()
    config = make(tensorboard=True, steps=8, eval_every=2, save_every=2, keep_last=9)
    train(config)
    # 续自第 6 步、第 2 步，最后一次一个检查点也没有，从头再来。
    for newest in (6, 2, 0):
        for folder in Path(config.out).glob("step-*"):
            if int(folder.name.removeprefix("step-")) > newest:
                shutil.rmtree(folder)
        (Path(config.out) / "best.json").unlink(missing_ok=True)
        train(config.replace(resume="auto"))
        one_value_a_step(Path(config.out))

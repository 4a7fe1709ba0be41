"""提前结束：数得对，续训逐位相同，换了尺子从头数，结束时说清并以 0 退出。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.cli.commands import train as command
from app.training import trainer as trainer_module
from app.training.config import DataConfig
from app.training.saving.checkpoint import resolve_checkpoint, step_folder
from app.training.watch.patience import Patience

from ..conftest import Make, rows, same_weights, train, write_dataset

# 每隔一步验证一次；最低在第 4 步。
LOSSES = {0: 9.0, 2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 1.5, 12: 0.5}
BUSY = {"eval_every": 2, "steps": 20, "save_every": 1, "keep_last": 99}


def test_counts_what_is_no_better() -> None:
    watch = Patience(2, None)
    for step, loss, over in ((1, 3.0, False), (2, 3.0, False), (3, 2.9, False), (4, 2.9, False),
                             (5, float("nan"), True)):  # fmt: skip
        watch.note(step, loss)
        assert watch.over is over
    assert watch.said == (
        "ended early at step 5: 2 validations in a row without a loss below 2.9000 of step 3 "
        "(patience 2)"
    )
    never = Patience(0, None)
    for step in range(1, 50):
        never.note(step, 1.0)
    assert not never.over


def test_state_goes_through_json_and_knows_its_ruler() -> None:
    watch = Patience(2, {"windows": 4})
    assert watch.state() == {}
    for step, loss in ((1, 0.1 + 0.2), (2, 4.0)):
        watch.note(step, loss)
    again, other = Patience(2, {"windows": 4}), Patience(2, {"windows": 5})
    for one in (again, other):
        one.load(json.loads(json.dumps(watch.state())))
        # 检查点是验证之前的状态：同一步再验证一遍不算数。
        one.note(2, 4.0)
        one.note(3, 4.0)
    assert again.over and not other.over
    again.load({})
    assert again.state() == {}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """验证损失由步数决定。"""
    real = trainer_module.Trainer._validate
    at = [0]

    def validate(self: Any) -> None:
        at[0] = self.step
        real(self)

    monkeypatch.setattr(trainer_module.Trainer, "_validate", validate)
    monkeypatch.setattr(
        trainer_module.Validation, "loss", lambda *args: LOSSES.get(at[0], 1.0 + at[0])
    )


def test_ends_early_and_says_so(make: Make, planned: None) -> None:
    told: list[str] = []
    config = make(**BUSY, patience=2, sample_tokens=3)
    result = train(config, told)
    assert (result.step, result.stopped, result.best) == (8, None, (4, 1.0))
    assert result.early == (
        "ended early at step 8: 2 validations in a row without a loss below 1.0000 of step 4 "
        "(patience 2)"
    )
    assert [row["step"] for row in rows(config.out, "eval")] == [0, 2, 4, 6, 8]
    assert resolve_checkpoint(config.out).name == "step-00000008"
    assert resolve_checkpoint(Path(config.out) / "best").name == "step-00000004"
    assert rows(config.out, "sample")[-1]["step"] == 8


@pytest.mark.parametrize("step", range(1, 9))
def test_resumes_exactly_at_every_step(
    make: Make, planned: None, tmp_path: Path, step: int
) -> None:
    """从任何一步续，都在同一步结束，权重逐位相等。"""
    config = make(**BUSY, patience=2)
    whole = train(config)
    branch = make(**BUSY, patience=2, out=str(tmp_path / "branch"),
                  resume=str(step_folder(Path(config.out), step)))  # fmt: skip
    result = train(branch)
    assert result.step == 8 and result.early == whole.early
    assert same_weights(whole.checkpoint, result.checkpoint)


def test_going_on_after_an_early_end(make: Make, planned: None) -> None:
    """再续一次，什么也不多训；给更多的耐心就接着训，那时第 12 步更好。"""
    config = make(**BUSY, patience=2)
    train(config)
    again = train(config.replace(resume="auto"))
    assert again.step == 8 and again.early is not None
    assert [row["step"] for row in rows(config.out, "eval")] == [0, 2, 4, 6, 8]
    more = train(config.replace(resume="auto", patience=4))
    assert more.best == (12, 0.5) and more.step == 20
    assert more.early is not None and more.early.startswith("ended early at step 20: 4 ")


def test_without_patience_nothing_changes(make: Make, planned: None, tmp_path: Path) -> None:
    plain = train(make(eval_every=2, steps=12, out=str(tmp_path / "plain")))
    watched = train(make(eval_every=2, steps=12, patience=99))
    assert plain.early is None and watched.early is None
    assert same_weights(plain.checkpoint, watched.checkpoint)


def test_nothing_to_watch_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patience=3 counts validations but eval_every=0"):
        make(patience=3)
    with pytest.raises(ValueError, match="patience=-1 must be at least 0"):
        make(patience=-1)
    folder = write_dataset(tmp_path / "words")
    (folder / "val").rename(tmp_path / "val")
    config = make(patience=3, eval_every=2, data=DataConfig(folder=str(folder)))
    with pytest.raises(ValueError, match="patience=3 watches .* has no validation part"):
        train(config)
    assert not Path(config.out).exists()


def test_the_command_succeeds_and_says_so(
    make: Make, planned: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(make(**BUSY).to_dict()))
    assert command.run(command.parse(["--config", str(path), "--patience", "2"])) == 0
    out = capsys.readouterr().out
    assert out.count("ended early at step 8: 2 validations in a row") == 2
    assert "finished" not in out and "best validation loss 1.0000 at step 4" in out

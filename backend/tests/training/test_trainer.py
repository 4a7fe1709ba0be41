"""循环：非有限值、停止、存不下、验证与样文不留痕迹、两个训练抢一个文件夹。"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.training import engine as engine_module
from app.training import trainer as trainer_module
from app.training.config import ScheduleConfig
from app.training.machine.stop_signal import StopSignal
from app.training.optim.schedule import learning_rate
from app.training.saving.checkpoint import list_steps, read_best, resolve_checkpoint, step_folder
from app.training.saving.lock import LOCK, RunLocked, run_lock
from app.training.step import Sums
from app.training.trainer import TrainingDiverged

from .conftest import Make, rows, same_weights, train, weights

LEARNS = {"steps": 60, "eval_every": 20, "save_every": 20, "batch_size": 8}


def test_learns_and_leaves_everything_needed(make: Make, tmp_path: Path) -> None:
    config = make(**LEARNS, sample_tokens=5, sample_every=20)
    result = train(config)
    losses = [row["loss"] for row in rows(config.out)]
    assert losses[-1] < losses[0] - 0.5 and result.step == 60 and result.stopped is None
    for row in rows(config.out):
        wanted = learning_rate(row["step"] - 1, peak=1e-2, steps=60, schedule=config.schedule)
        assert row["lr"] == wanted and row["tokens"] == row["step"] * 64
    folder = resolve_checkpoint(config.out)
    assert folder == result.checkpoint
    files = {entry.name for entry in folder.iterdir()}
    assert files == {
        "config.json", "model.safetensors", "optim.safetensors", "state.json",
        "tokenizer.json", "tokenizer_meta.json", "manifest.json",
    }  # fmt: skip
    assert result.best == read_best(Path(config.out))
    assert result.best is not None and result.best[1] == min(
        r["loss"] for r in rows(config.out, "eval")
    )
    assert resolve_checkpoint(Path(config.out) / "best").name == f"step-{result.best[0]:08d}"
    assert json.loads((folder / "state.json").read_text())["tokens"] == 60 * 8 * 8
    assert not [entry for entry in Path(config.out).iterdir() if entry.name.startswith(".")]


def test_checkpoint_is_a_model_folder(make: Make) -> None:
    from app.data.tokenizers import load_tokenizer
    from app.models.transformer import GPT2Model

    result = train(make())
    model = GPT2Model.from_pretrained(result.checkpoint)
    saved = weights(result.checkpoint)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert load_tokenizer(result.checkpoint).decode([0])


def test_looking_does_not_disturb(make: Make, tmp_path: Path) -> None:
    """验证、样文、保存的有无，不改变一位权重（dropout 开着）。"""
    quiet, busy = make(out=str(tmp_path / "quiet")), make(out=str(tmp_path / "busy"))
    first = train(quiet)
    second = train(
        busy.replace(eval_every=1, sample_every=1, sample_tokens=12, save_every=1, keep_last=1)
    )
    assert len(rows(busy.out, "eval")) == 7
    assert same_weights(first.checkpoint, second.checkpoint)


def test_micro_batches_do_not_change_the_run(make: Make, tmp_path: Path) -> None:
    model = make().model.replace(dropout=0.0)
    losses = []
    for micro in (None, 1, 3):
        config = make(out=str(tmp_path / f"micro-{micro}"), micro_batch=micro, model=model)
        train(config)
        losses.append([row["loss"] for row in rows(config.out)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def _poison(patch: pytest.MonkeyPatch, steps: set[int], value: float, where: str) -> None:
    """在指定的步里把损失、一个梯度或一个权重换成 value。"""
    real, calls = engine_module.accumulate, [0]

    def accumulate(model: Any, *args: Any) -> Sums:
        calls[0] += 1
        matrix = next(p for p in model.h["1"].parameters() if p.ndim == 2)
        if calls[0] in steps and where == "weight":
            matrix.data[0, 0] = value
        sums = real(model, *args)
        if calls[0] in steps and where == "loss":
            return sums._replace(loss=sums.loss * value)
        if calls[0] in steps and where == "gradient":
            matrix.grad[0, 0] = value
        return sums

    patch.setattr(engine_module, "accumulate", accumulate)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_step_changes_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, value: float, where: str
) -> None:
    """C1：那一步权重与优化器都不动，计数，记下是哪几行，训练继续。"""
    _poison(monkeypatch, {3}, value, where)
    config, told = make(save_every=1, keep_last=9), []
    result = train(config, told)
    run = Path(config.out)
    assert result.skipped == 1 and result.step == 6
    for name in ("model.safetensors", "optim.safetensors"):
        before, after = ((step_folder(run, step) / name).read_bytes() for step in (2, 3))
        assert before == after
    assert not same_weights(step_folder(run, 3), step_folder(run, 4))
    skipped = rows(run, "skipped")
    assert [row["step"] for row in skipped] == [3] and len(skipped[0]["rows"]) == 4
    assert ("h.1." in skipped[0]["where"]) == (where == "gradient")
    assert all(torch.isfinite(value).all() for value in weights(result.checkpoint).values())


def test_three_in_a_row_stop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {3, 5, 6, 7}, float("nan"), "loss")
    config = make(steps=20, save_every=2)
    with pytest.raises(TrainingDiverged, match=r"up to step 7 .*step-00000006"):
        train(config)
    assert resolve_checkpoint(config.out).name == "step-00000006"


def test_three_in_a_row_over_a_resume(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(steps=20, save_every=2)
    with monkeypatch.context() as patch:
        _poison(patch, {5, 6}, float("nan"), "loss")
        train(config.replace(steps=6))
    _poison(monkeypatch, {1}, float("nan"), "loss")
    with pytest.raises(TrainingDiverged, match=r"up to step 7 .*step-00000006"):
        train(config.replace(resume="auto"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("save_every", [2, 1])
def test_a_broken_weight_stops_and_is_never_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch, value: float, save_every: int
) -> None:
    """C1：权重坏了没有哪一步救得回；不存它，点名坏之前的检查点。"""
    _poison(monkeypatch, {3}, value, "weight")
    config, told = make(steps=20, save_every=save_every, keep_last=1), []
    with pytest.raises(TrainingDiverged, match=r"step-00000002$"):
        train(config, told)
    assert [step for step, _ in list_steps(Path(config.out))] == [2]
    saved = weights(resolve_checkpoint(config.out))
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert rows(config.out, "skipped")[0]["where"] == "the weight h.1.attn.c_attn.weight"


def test_failing_save_keeps_training(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """途中存不下只警告；最后一次存不下才是错误，旧检查点还在。"""
    real, fail = trainer_module.write_checkpoint, {4}

    def write(run: Path, step: int, fill: Any) -> Path:
        if step in fail:
            raise OSError("No space left on device")
        return real(run, step, fill)

    monkeypatch.setattr(trainer_module, "write_checkpoint", write)
    config = make(save_every=2, keep_last=9)
    assert train(config).step == 6
    assert "no checkpoint at step 4: No space left" in capsys.readouterr().out
    assert [step for step, _ in list_steps(Path(config.out))] == [2, 6]
    fail.add(8)
    with pytest.raises(OSError, match="No space left"):
        train(config.replace(steps=8, resume="auto"))
    assert resolve_checkpoint(config.out).name == "step-00000006"


def test_signal_stops_between_steps(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """每一种信号：存下、停住、续上之后与不间断的逐位相等。"""
    whole = train(make(out=str(tmp_path / "whole")))
    real = trainer_module.Trainer._train_step
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        config = make(out=str(tmp_path / name))

        def step(self: Any, name: str = name) -> None:
            real(self)
            if self.step == 3:
                os.kill(os.getpid(), getattr(signal, name))

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.Trainer, "_train_step", step)
            result = train(config)
        assert result.stopped == name and result.step == 3
        assert same_weights(whole.checkpoint, train(config.replace(resume="auto")).checkpoint)


def test_signal_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_quits_at_once() -> None:
    """C3"""
    code = (
        "import os, signal\n"
        "from app.training.machine.stop_signal import StopSignal\n"
        "with StopSignal():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never', flush=True)\n"
    )
    backend = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=backend, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "alive\n")
    assert "once more quits at once" in done.stderr


def test_second_trainer_is_refused(make: Make, tmp_path: Path) -> None:
    """A11"""
    config = make(resume="auto")
    run = Path(config.out)
    run.mkdir()
    (run / "run.yaml").write_text("")
    with run_lock(run):
        with pytest.raises(RunLocked, match=f"process {os.getpid()} on "):
            train(config)
        assert {entry.name for entry in run.iterdir()} == {LOCK, "run.yaml"}
    assert (run / LOCK).read_text() == ""


def _die_holding(run: Path) -> None:
    with run_lock(run):
        os._exit(1)


def test_dead_owner_is_replaced(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_holding, args=(tmp_path,))
    process.start()
    process.join()
    told: list[str] = []
    with run_lock(tmp_path, told.append):
        pass
    assert len(told) == 1 and f"process {process.pid} on" in told[0]


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ('{"pid": 1, "host": "another-machine"}', "process 1 on another-machine"),
        ('{"pid": 1', "process unknown on an unknown host"),
        ("{}", "process unknown on an unknown host"),
        ("[1]", "process unknown on an unknown host"),
    ],
)
def test_what_the_lock_file_says_blocks_nobody(make: Make, text: str, owner: str) -> None:
    """死掉的容器留下别的主机名：内核的锁得到了，就接着训。"""
    config, told = make(save_every=2), []
    train(config)
    (Path(config.out) / LOCK).write_text(text)
    assert train(config.replace(resume="auto", steps=7), told).step == 7
    assert f"took over the lock of {owner}, which has ended without releasing it" in told


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="cannot be locked .*No locks available"), run_lock(tmp_path):
        pass


def test_metrics_failure_does_not_stop(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """C8"""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from app.training.report.metrics import Metrics

    told: list[str] = []
    with Metrics(Path(make().out).parent / "metrics.jsonl", 0, told.append) as metrics:
        metrics._file.close()
        metrics._file = open("/dev/full", "a")  # noqa: SIM115
        for step in range(3):
            metrics.write({"kind": "train", "step": step, "loss": 1.0})
            metrics.sync()
    assert len(told) == 1 and "training goes on" in told[0]


def test_initial_loss_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(steps=1, schedule=ScheduleConfig(warmup_steps=0)))
    out = capsys.readouterr().out
    assert "ln 32 = 3.466" in out and "as it should be" in out


def test_plot_is_drawn(make: Make) -> None:
    config = make(eval_every=2)
    result = train(config)
    assert result.plot is not None
    data = result.plot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000


def test_bad_inputs_leave_nothing(make: Make, tmp_path: Path) -> None:
    from app.training.config import DataConfig

    for config, message in (
        (make(data=DataConfig(folder=str(tmp_path / "missing"))), "gpt2 prepare"),
        (make(model=make().model.replace(vocab_size=4)), "vocabulary of"),
        (make(device="cuda:7"), "device='cuda:7' cannot be used"),
        (make(device="gpu"), "device='gpu' cannot be used"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config)
        assert not Path(config.out).exists()


def test_out_of_memory_names_the_fix(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(engine_module, "accumulate", fail)
    with pytest.raises(MemoryError, match="2 sequences of 8 tokens.*--micro-batch 1"):
        train(make())


def test_best_is_the_lowest_and_is_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([9.0, 3.0, 1.0, 2.0, 1.5, 4.0, 5.0])
    monkeypatch.setattr(trainer_module.Validation, "loss", lambda *args: next(values))
    config = make(eval_every=1, save_every=1, keep_last=1)
    result = train(config)
    assert result.best == read_best(Path(config.out)) == (2, 1.0)
    assert [step for step, _ in list_steps(Path(config.out))] == [2, 6]


def test_untrained_model_is_never_the_best(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 3.0])
    monkeypatch.setattr(trainer_module.Validation, "loss", lambda *args: next(values))
    assert train(make(eval_every=6)).best == (6, 3.0)


def test_gradients_are_clipped_once_over_all(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = trainer_module.build_optimizer, []

    def build(model: Any, config: Any) -> Any:
        optimizer, why = real(model, config)
        grads = lambda *args: [p.grad.flatten() for p in model.parameters()]  # noqa: E731
        optimizer.register_step_pre_hook(lambda *a: seen.append(float(torch.cat(grads()).norm())))
        return optimizer, why

    monkeypatch.setattr(trainer_module, "build_optimizer", build)
    config = make(optim=make().optim.__class__(lr=1e-3, grad_clip=0.01))
    train(config)
    before = [row["grad_norm"] for row in rows(config.out)]
    assert min(before) > 0.02 and seen == pytest.approx([0.01] * 6, rel=1e-3)

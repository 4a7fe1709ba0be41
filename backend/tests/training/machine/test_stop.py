"""信号（C2、C3）：训练的每一处都停得住，存得下，续上之后与不间断的逐位相等。"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from app.data.feeding.windows import Windows
from app.training import engine as engine_module
from app.training import run as run_module
from app.training import trainer as trainer_module
from app.training.machine.stop_signal import Interrupted, StopSignal
from app.training.report.run_page import Reporter
from app.training.saving import checkpoint as ck
from app.training.saving.checkpoint import resolve_checkpoint, step_folder, verify_checkpoint

from ..child import BACKEND, ENV, answer, arguments, run_child
from ..conftest import Make, rows, same_weights, train

STEPS = 8
BUSY = {
    "steps": STEPS, "eval_every": 2, "save_every": 2, "sample_every": 3, "sample_tokens": 4,
    "keep_last": 1,
}  # fmt: skip


# 每一处：(对象, 名字, 第几次调用时信号到来)。
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "reading the batch": (Windows, "batch", 3),
    "forward and backward": (engine_module, "accumulate", 4),
    "clipping": (torch.nn.utils, "clip_grads_with_norm_", 3),
    "metrics": (trainer_module.Metrics, "write", 9),
    "first validation": (trainer_module.Validation, "loss", 1),
    "validation": (trainer_module.Validation, "loss", 3),
    "last validation": (trainer_module.Validation, "loss", 5),
    "sample": (trainer_module, "sample_text", 1),
    "last sample": (trainer_module, "sample_text", 3),
    "first save": (trainer_module, "write_state", 1),
    "save": (trainer_module, "write_state", 3),
    "last save": (trainer_module, "write_state", 4),
    "manifest": (ck, "_write_manifest", 2),
    "sync after the rename": (ck, "sync_folder", 4),
    "pruning": (trainer_module, "prune", 4),
    "marking the best": (trainer_module, "mark_best", 2),
    "report": (Reporter, "sync", 4),
    "assembling": (run_module, "_assemble", 1),
    "compiling": (trainer_module, "compile_blocks", 1),
    "plan": (run_module, "write_facts", 1),
}


@pytest.fixture
def whole(make: Make, tmp_path: Path) -> Path:
    out = tmp_path / "whole"
    train(make(out=str(out), **BUSY))
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_stops_at_every_place(
    make: Make, whole: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """C2：20 处各来一个 SIGTERM：退出时存好，续上之后权重、优化器、损失、验证与样文逐位相等。"""
    where, name, wanted = MOMENTS[moment]
    real, calls = getattr(where, name), [0]

    def hooked(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    config = make(**BUSY)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, hooked)
        result = train(config)
    assert calls[0] >= wanted and result.stopped == "SIGTERM"
    assert verify_checkpoint(resolve_checkpoint(config.out))["step"] == result.step
    again = train(config.replace(resume="auto"))
    assert again.stopped is None and again.step == STEPS
    first, second = (step_folder(run, STEPS) for run in (whole, Path(config.out)))
    for file in ("model.safetensors", "optim.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    for kind, key in (("train", "loss"), ("eval", "loss"), ("sample", "text")):
        seen = [[(r["step"], r[key]) for r in rows(run, kind)] for run in (whole, config.out)]
        assert seen[0] == seen[1], kind
    assert ck.read_best(whole) == ck.read_best(Path(config.out))


def test_compiling_is_cut_short() -> None:
    """编译要几十秒，中断它不失去什么；在它之外只立旗。"""
    with StopSignal() as stop:
        with pytest.raises(Interrupted), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not interrupted")
        with pytest.raises(Interrupted), stop.at_once():
            raise AssertionError("already asked to stop")
        assert stop.requested == "SIGTERM"
    assert not issubclass(Interrupted, Exception)


COMPILING = """
import signal, threading, time
from app.training import trainer as trainer_module
real = trainer_module.accumulate
def accumulate(*args):
    threading.Timer(float(os.environ["AFTER"]), os.kill, (os.getpid(), signal.SIGTERM)).start()
    return real(*args)
trainer_module.accumulate = accumulate
result = train(config)
print(json.dumps([result.stopped, result.step]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 2.0, 5.0])
def test_stops_while_really_compiling(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    """C2：编译器真的在跑时来 SIGTERM：存下第 0 步，续上之后照常。"""
    monkeypatch.setitem(ENV, "AFTER", str(after))
    monkeypatch.setitem(ENV, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = make(compile="on")
    stopped, step = answer(run_child(COMPILING, config, tmp_path))
    assert stopped == "SIGTERM" and step < config.steps
    assert verify_checkpoint(resolve_checkpoint(config.out))["step"] == step
    again = train(config.replace(compile="off", resume="auto"))
    assert again.step == config.steps


# 在某处停下来等，好让信号恰好落在那里；印一行之后等。
PAUSED = """
from importlib import import_module
from app.cli import main as cli
room, name = os.environ["PAUSE"].split(".")
module = import_module("app.training." + room)
real, calls = getattr(module, name), [0]
def paused(*args, **options):
    calls[0] += 1
    result = real(*args, **options)
    if calls[0] == 2:
        print("paused", flush=True)
        sys.stdin.readline()
    return result
setattr(module, name, paused)
path = folder / "run.yaml"
path.write_text(json.dumps(config.to_dict()))
sys.exit(cli.main(["train", "--config", str(path)]))
"""


def start_paused(config: Any, folder: Path, where: str) -> subprocess.Popen[str]:
    """走到 where 第二次调用里停住的训练。"""
    process = subprocess.Popen(
        arguments(PAUSED, config, folder),
        cwd=BACKEND, env=ENV | {"PAUSE": where}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line == "paused\n":
            return process
    raise AssertionError(process.communicate())


def wait_for_note(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if "once more quits at once" in line:
            return


def twice(process: subprocess.Popen[str], first: int, second: int) -> int:
    process.send_signal(first)
    wait_for_note(process)
    process.send_signal(second)
    code = process.wait()
    process.communicate()
    return code


@pytest.mark.parametrize(
    "where",
    ["trainer.write_state", pytest.param("engine.accumulate", marks=pytest.mark.slow)],
)
def test_twice_quits_at_once(make: Make, tmp_path: Path, where: str) -> None:
    """C3：存到一半（或算到一半）时按两次 Ctrl-C：130 退出，旧检查点完好，续上之后逐位相等。"""
    config = make(save_every=1 if where == "engine.accumulate" else 2, steps=6)
    process = start_paused(config, tmp_path, where)
    assert twice(process, signal.SIGINT, signal.SIGINT) == 130
    newest, skipped = ck.find_latest(Path(config.out))
    assert newest is not None and not skipped
    assert ck.step_of(newest) == (1 if where == "engine.accumulate" else 2)
    again = train(config.replace(resume="auto"))
    assert not list(Path(config.out).glob(".tmp-*"))
    whole = train(make(out=str(tmp_path / "whole"), steps=6))
    assert same_weights(whole.checkpoint, again.checkpoint)


def test_the_terminal_is_gone(make: Make, tmp_path: Path) -> None:
    """C3：终端关了：SIGHUP，标准输出与标准错误都已没有读者；照样存好，退出 0。"""
    config = make(save_every=1, steps=6)
    process = start_paused(config, tmp_path, "engine.accumulate")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    # 停住的那一步还在等：给它一行。
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait() == 0
    assert verify_checkpoint(resolve_checkpoint(config.out))["step"] == 2
    again = train(config.replace(resume="auto"))
    whole = train(make(out=str(tmp_path / "whole"), steps=6))
    assert same_weights(whole.checkpoint, again.checkpoint)

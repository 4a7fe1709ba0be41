"""盘满（A5）与记录写不下（C8）：旧检查点还在，训练继续或说清楚，腾出空间之后一切如常。"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.training import run as run_module
from app.training import trainer as trainer_module
from app.training.report.metrics import METRICS, Metrics
from app.training.report.run_charts import PLOT
from app.training.report.run_page import REPORT
from app.training.report.tensorboard import EVENTS
from app.training.saving.checkpoint import list_steps, read_best, step_folder

from ..child import answer, run_child
from ..conftest import Make, rows, same_weights, train
from ..report.test_tensorboard import installed

SAVES = 20
_MOUNT = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'


@pytest.fixture
def tmpfs(tmp_path: Path) -> tuple[Path, list[str]]:
    """(只在子进程里是 2 MB 的盘的文件夹, 子进程命令的开头)。"""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    for flags in (["-m"], ["-r", "-m"]):
        prefix = ["unshare", *flags, "sh", "-c", _MOUNT, str(folder)]
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return folder, prefix
    pytest.skip("needs to mount a tmpfs: root or user namespaces")


FILL = """
import random, shutil
from app.training import trainer as trainer_module
from app.training.saving.checkpoint import find_latest, step_of
run, filler = Path(config.out), folder / "filler"
def newest():
    found, skipped = find_latest(run)
    assert not skipped
    return None if found is None else step_of(found)
def leave(bytes_free):
    disk = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - bytes_free))
real = trainer_module.write_checkpoint
"""

FAILING_SAVES = (
    FILL
    + """
source, failures, size = random.Random(0), [], []
def write(run, step, fill):
    if step % 2 == 0 or not size:
        path = real(run, step, fill)
        size.append(sum(-(-f.stat().st_size // 4096) * 4096 for f in path.iterdir()))
        return path
    leave(source.randrange(size[0]))
    try:
        return real(run, step, fill)
    except OSError as error:
        left = [p.name for p in run.iterdir() if p.name.startswith(".tmp")]
        failures.append((step, newest(), str(error), left))
        raise
    finally:
        filler.unlink()
trainer_module.write_checkpoint = write
result = train(config)
shutil.copytree(result.checkpoint, sys.argv[2] + "-copy")
print(json.dumps({"failures": failures, "newest": newest()}))
"""
)


def test_saves_on_a_full_disk(make: Make, tmpfs: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A5：20 次保存断在随机处（真的 ENOSPC）：旧的仍可读，训练继续，没有残余，结果逐位不变。"""
    disk, prefix = tmpfs
    config = make(
        out=str(disk / "run"), steps=2 * SAVES + 2, save_every=1, keep_last=2, sample_tokens=0
    )
    done = run_child(FAILING_SAVES, config, disk, prefix)
    found = answer(done)
    assert [step for step, *_ in found["failures"]] == list(range(3, 2 * SAVES + 3, 2))[:SAVES]
    for step, newest, reason, left in found["failures"]:
        assert newest == step - 1 and left == []
        assert "No space left" in reason or "os error 28" in reason
    assert done.stdout.count("training goes on; last good one: ") == SAVES
    assert found["newest"] == config.steps
    whole = train(config.replace(out=str(tmp_path / "whole"), save_every=0))
    assert same_weights(whole.checkpoint, tmp_path / "disk-copy")


FULL_TO_THE_END = (
    FILL
    + """
from app.cli import main as cli
plain = trainer_module.Trainer._train_step
def step(self):
    plain(self)
    if self.step == 44:
        leave(0)
trainer_module.Trainer._train_step = step
path = folder / "run.yaml"
path.write_text(json.dumps(config.to_dict()))
code = cli.main(["train", "--config", str(path)])
trainer_module.Trainer._train_step = plain
before, kept = newest(), sorted(p.name for p in run.iterdir())
filler.unlink()
again = train(config.replace(resume="auto"))
shutil.copytree(again.checkpoint, sys.argv[2] + "-copy")
shutil.copy(run / "metrics.jsonl", sys.argv[2] + "-metrics.jsonl")
after = sorted(p.name for p in run.iterdir())
print()
print(json.dumps({"code": code, "before": before, "kept": kept, "after": after}))
"""
)


@pytest.mark.slow
def test_a_disk_that_stays_full(make: Make, tmpfs: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A5：满到最后：一行报错、点名旧检查点；腾出空间再续，与不间断的逐位相等，没有残余。"""
    disk, prefix = tmpfs
    config = make(out=str(disk / "run"), steps=100, save_every=20, eval_every=20)
    done = run_child(FULL_TO_THE_END, config, disk, prefix)
    found = answer(done)
    assert found["code"] == 2 and found["before"] in (20, 40)
    last = f"step-{found['before']:08d}"
    assert done.stderr.startswith("error: no checkpoint at step 100: ") and last in done.stderr
    assert done.stderr.count("\n") == 1 and "free some space, then --resume auto" in done.stderr
    for name in (METRICS, REPORT):
        assert done.stdout.count(f"cannot write {name}") == 1
    assert not [n for n in found["after"] if n.startswith(".") or n.endswith(".tmp")]
    whole = train(config.replace(out=str(tmp_path / "whole")))
    assert same_weights(whole.checkpoint, tmp_path / "disk-copy")
    (tmp_path / "seen").mkdir()
    shutil.move(tmp_path / "disk-metrics.jsonl", tmp_path / "seen" / METRICS)
    for kind in ("train", "eval"):
        first, second = rows(whole.run_file.parent, kind), rows(tmp_path / "seen", kind)
        assert [(r["step"], r["loss"]) for r in first] == [(r["step"], r["loss"]) for r in second]


def _metrics(run: Path, patch: pytest.MonkeyPatch) -> None:
    real = Metrics.__init__

    def start(self: Metrics, *args: Any) -> None:
        real(self, *args)
        self._file.close()
        self._file = open("/dev/full", "a")  # noqa: SIM115

    patch.setattr(Metrics, "__init__", start)


def _blocked(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """那个名字被一个文件夹占着，改名盖不过去；root 也一样。"""

    def block(run: Path, patch: pytest.MonkeyPatch) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
        (run / name / "x").write_text("")

    return block


def _events(run: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run / EVENTS)
    (run / EVENTS).write_text("a file where the folder should be")


LOGGERS = {
    METRICS: _metrics,
    REPORT: _blocked(REPORT),
    PLOT: _blocked(PLOT),
    EVENTS: _events,
}


@installed
@pytest.mark.parametrize("name", LOGGERS)
def test_a_failing_logger_is_one_warning_plot(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """C8：指标、报告、曲线、事件，一样一样地坏：训练照常，恰好一句提醒，权重逐位不变。"""
    if name == METRICS and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    told: list[str] = []
    monkeypatch.setattr(trainer_module.Progress, "tell", lambda self, text: told.append(text))
    config = make(tensorboard=True, eval_every=2, save_every=2)
    train(config.replace(steps=5))
    run = Path(config.out)
    told.clear()
    LOGGERS[name](run, monkeypatch)
    result = train(config.replace(resume="auto", steps=6), told)
    warnings = [line for line in told if "cannot write" in line or "cannot draw" in line]
    assert len(warnings) == 1 and name in warnings[0]
    assert result.step == 6 and step_folder(run, 6) == list_steps(run)[-1][1]
    assert not list(run.glob("*.tmp")) and not list(run.glob(".tmp-*"))
    assert result.plot == (None if name == PLOT else run / PLOT)
    whole = train(make(out=str(tmp_path / "whole")))
    assert same_weights(whole.checkpoint, result.checkpoint)


@pytest.mark.parametrize("name", ["mark_best", "prune"])
def test_tidying_up_fails(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """检查点已存好，只是记不下最好的一步、删不掉旧的：提醒后继续；最好的仍是记下的那个。"""
    real, calls = getattr(trainer_module, name), [0]

    def fail_once(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("Device or resource busy")
        real(*args)

    told: list[str] = []
    monkeypatch.setattr(trainer_module.Progress, "tell", lambda self, text: told.append(text))
    monkeypatch.setattr(trainer_module, name, fail_once)
    values = iter([9.0, 3.0, 2.0, 5.0])
    monkeypatch.setattr(trainer_module.Validation, "loss", lambda *args: next(values))
    config = make(eval_every=2, save_every=2, keep_last=1)
    result = train(config)
    assert len([text for text in told if "Device or resource busy; training" in text]) == 1
    best = 2 if name == "mark_best" else 4
    assert result.step == 6 and result.best is not None and result.best[0] == best
    assert read_best(Path(config.out)) == result.best
    assert step_folder(Path(config.out), best) in [path for _, path in list_steps(Path(config.out))]


def test_a_failing_plot_does_not_hide_the_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: Path) -> None:
        raise OSError("No space left on device")

    def diverge(self: Any) -> None:
        raise trainer_module.TrainingDiverged("three steps in a row")

    monkeypatch.setattr(run_module, "plot_losses", broken)
    monkeypatch.setattr(trainer_module.Trainer, "_train_step", diverge)
    with pytest.raises(trainer_module.TrainingDiverged, match="three steps in a row"):
        train(make())
    assert "cannot draw loss.png: OSError: No space left" in capsys.readouterr().out

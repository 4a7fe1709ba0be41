"""真的 torchrun 与 --ranks：起得来、拒绝得早；rank 被杀、卡住、报错、收到信号（P14、C4、C5）。"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from app.cli.main import main
from app.training.config import TrainConfig
from app.training.saving.checkpoint import find_latest, list_steps

from ..training.conftest import Make
from .team import fingerprint, train_on

BACKEND = Path(__file__).parents[2]
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(BACKEND),
    # docs/distributed.md：不设它，重启之后常常连不上（pytorch #135712）。
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
STEPS = 12
# 在 (rank, 步) 处出一次事（WHAT）；记号文件使重启之后不再出。
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from app.cli.main import main
from app.training.trainer import Trainer

what, rank, step, mark = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
real = Trainer._train_step

def stuck():
    time.sleep(1000)

def train_step(self):
    if self.step == step and os.environ["RANK"] == rank and not mark.exists():
        if what != "raise":
            mark.write_text(str(os.getpid()))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "raise":
            raise RuntimeError("this rank is broken")
        if what == "hang":
            stuck()
    real(self)

Trainer._train_step = train_step
sys.exit(main(["train", *sys.argv[5:]]))
"""


@pytest.fixture
def config(make: Make, tmp_path: Path) -> TrainConfig:
    return make(
        out=str(tmp_path / "run"), steps=STEPS, batch_size=8, micro_batch=2, save_every=2,
        keep_last=3,
    )  # fmt: skip


@pytest.fixture
def run_file(config: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "script.py").write_text(SCRIPT)
    return path


def torchrun(run_file: Path, fault: list[str], *more: str, restarts: int = 2) -> list[str]:
    """fault：[WHAT, rank, 步]。"""
    folder = run_file.parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(folder / "script.py"), *fault, str(folder / "mark")]
    options = ["--config", str(run_file), "--resume", "auto", *more]
    return [*launch, f"--max-restarts={restarts}", *script, *options]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=BACKEND, env=ENV, capture_output=True, text=True, timeout=280
    )


def gpt2(*words: str) -> list[str]:
    return [sys.executable, "-m", "app.cli", *words]


def undisturbed(config: TrainConfig, tmp_path: Path) -> str:
    return fingerprint(train_on(1, config.replace(out=str(tmp_path / "undisturbed")))[0])


def newest(config: TrainConfig) -> Path:
    found, skipped = find_latest(Path(config.out))
    assert found is not None and not skipped
    return found


def test_two_ranks_from_the_command_line(
    config: TrainConfig, run_file: Path, tmp_path: Path
) -> None:
    """--ranks 2：一份输出、一个文件夹，与一个 rank 同样的位。"""
    done = run(gpt2("train", "--config", str(run_file), "--ranks", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"finished {STEPS} steps") == 1 and "replicate 2" in done.stdout
    assert fingerprint(newest(config)) == undisturbed(config, tmp_path)
    assert not (Path(config.out) / "trainer.lock").read_text()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_refusals_come_before_the_group_and_once(
    config: TrainConfig,
    run_file: Path,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """如同在 torchrun 的一个 rank 里：没有别的 rank 可等，也立刻拒绝；只有 rank 0 说。"""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "--config", str(run_file)]) == 2
    said = capsys.readouterr()
    assert ("use 2 ranks (a power of two)" in said.err) == (rank == "0") and not said.out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--config", str(run_file), "--ranks", "2"]) == 2
    assert ("leave --ranks out" in capsys.readouterr().err) == (rank == "0")
    assert not Path(config.out).exists()


def test_settings_without_ranks_are_refused(
    config: TrainConfig, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(run_file), "--parallel.shard", "2"]) == 2
    assert "parallel.shard=2 but this is 1 process" in capsys.readouterr().err
    assert main(["train", "--config", str(run_file), "--ranks", "5"]) == 2
    assert "5 ranks read different rows: use 4 ranks" in capsys.readouterr().err
    assert not Path(config.out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("step", [3, 6])
def test_a_killed_rank_is_started_again(
    config: TrainConfig, run_file: Path, tmp_path: Path, rank: str, step: int
) -> None:
    """C4：torchrun --max-restarts：做完，权重等于没有受扰的。"""
    done = run(torchrun(run_file, ["kill", rank, str(step)]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from {Path(config.out)}" in done.stdout
    assert fingerprint(newest(config)) == undisturbed(config, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_while_saving(config: TrainConfig, run_file: Path, tmp_path: Path) -> None:
    """P13：两个 rank 轮流在随机的时刻被杀，六次：每次留下的检查点都是好的，最后的位相同。"""
    command = gpt2("train", "--config", str(run_file), "--save-every", "1", "--ranks", "2")
    for number in range(6):
        process = subprocess.Popen(
            [*command, "--resume", "auto"], cwd=BACKEND, env=ENV, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        before = len(list_steps(Path(config.out))) and list_steps(Path(config.out))[-1][0]
        while time.monotonic() < deadline and process.poll() is None:
            steps = list_steps(Path(config.out))
            if steps and steps[-1][0] > before:
                break
            time.sleep(0.01)
        children = ranks_of(process.pid)
        if number % 2 < len(children) and process.poll() is None:
            children[number % 2].kill()
        process.communicate(timeout=120)
        assert newest(config)
        if newest(config).name == f"step-{STEPS:08d}":
            break
    assert run([*command, "--resume", "auto"]).returncode == 0
    assert fingerprint(newest(config)) == undisturbed(config, tmp_path)


def ranks_of(pid: int) -> list[psutil.Process]:
    """按 rank 排。"""
    found = psutil.Process(pid).children()
    return sorted(found, key=lambda child: child.environ().get("RANK", ""))


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_at_the_same_step(
    config: TrainConfig, run_file: Path, tmp_path: Path
) -> None:
    done = run(torchrun(run_file, ["term", "1", "4"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped by SIGTERM at step 5; saved" in done.stdout
    assert newest(config).name == "step-00000005"
    assert run(torchrun(run_file, ["none", "0", "0"])).returncode == 0
    assert fingerprint(newest(config)) == undisturbed(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "--ranks"])
def test_sigterm_to_the_launcher(
    config: TrainConfig, run_file: Path, tmp_path: Path, launcher: str
) -> None:
    """各 rank 存好才走；torchrun 自己返回 1（SignalException），--ranks 返回 0。"""
    command = torchrun(run_file, ["none", "0", "0"], "--steps", "100000")
    if launcher == "--ranks":
        command = gpt2("train", "--config", str(run_file), "--steps", "100000", "--ranks", "2")
    process = subprocess.Popen(
        command, cwd=BACKEND, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list_steps(Path(config.out)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (0 if launcher == "--ranks" else 1), out + err
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+); saved", out)
    assert newest(config).name == f"step-{int(step):08d}"


@pytest.mark.slow
def test_a_rank_that_always_raises(config: TrainConfig, run_file: Path) -> None:
    """C5：重启用完之后返回非零，说对是哪个 rank，不留下进程。"""
    done = run(torchrun(run_file, ["raise", "1", "3"], restarts=1))
    assert done.returncode != 0
    assert "this rank is broken" in done.stderr
    root = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*:\s*1 \(local_rank: 1\)", root), root
    script = str(run_file.parent / "script.py")
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if script in (p.info["cmdline"] or [])]
    assert not left and newest(config).name == "step-00000002"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_started_again(
    config: TrainConfig, run_file: Path, tmp_path: Path
) -> None:
    limits = ["--parallel.timeout-s", "8", "--parallel.grace-s", "3"]
    done = run(torchrun(run_file, ["hang", "1", "5"], *limits))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rank 0 lost the other ranks: rank 1 was not waiting but in ", done.stderr)
    assert fingerprint(newest(config)) == undisturbed(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_ends_ranks(config: TrainConfig, run_file: Path, rank: str) -> None:
    """--ranks 不重启：说是哪个 rank 怎样结束的，别的也结束。"""
    script = str(run_file.parent / "script.py")
    words = ["kill", rank, "5", str(run_file.parent / "mark"), "--config", str(run_file)]
    code = (
        "import sys; from app.distributed import launch\n"
        "real = launch.subprocess.Popen\n"
        "def popen(words, **more):\n"
        f"    return real([sys.executable, {script!r}, *{words!r}], **more)\n"
        "launch.subprocess.Popen = popen\n"
        "sys.exit(launch.start_ranks(2, []))"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 137, done.stdout + done.stderr
    assert f"error: rank {rank} was ended by SIGKILL" in done.stderr
    assert f"rank {1 - int(rank)} lost the other ranks" in done.stderr
    assert newest(config).name == "step-00000004"

"""`gpt2 train` 作为真的进程：帮助、报错、信号之后逐位续上；以及运行文件。"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.cli.commands import train as command
from app.cli.shared import runfile
from app.cli.shared.runfile import find_run_file, load_config
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.training.config import TrainConfig
from app.training.saving.checkpoint import resolve_checkpoint, verify_checkpoint

BACKEND = Path(__file__).parents[2]
RECIPES = BACKEND.parent / "recipes"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BACKEND)}

STEPS = 300

RUN_FILE = """\
out: {out}
data: {{folder: {data}}}
model: {{n_layer: 2, n_head: 2, n_embed: 16, context_size: 8, dropout: 0.1}}
optim: {{lr: 1e-2}}
schedule: {{warmup_steps: 5}}
steps: {steps}
batch_size: 4
micro_batch: 2
eval_every: 7
eval_batches: 2
sample_every: 0
sample_tokens: 0
save_every: 5
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = random.Random(0)
    text = folder / "words.txt"
    text.write_text("".join(source.choice(["the ", "cat ", "sat.\n"]) for _ in range(3000)))
    prepare(Sources((text,)), folder / "words", TokenizerSpec("chars"), say=lambda line: None)
    return folder / "words"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """不间断的一次：下面各种中断都要与它逐位相等。"""
    folder = tmp_path_factory.mktemp("whole")
    done = gpt2("--config", str(write_run_file(folder, data, "run")))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_same(whole: Path, run: Path) -> None:
    assert losses(whole) == losses(run)
    for name in ("model.safetensors", "optim.safetensors"):
        first, second = (folder / f"step-{STEPS:08d}" / name for folder in (whole, run))
        assert first.read_bytes() == second.read_bytes()


def write_run_file(folder: Path, data: Path, name: str, steps: int = STEPS) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RUN_FILE.format(out=folder / name, data=data, steps=steps))
    return path


def gpt2(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "train", *args],
        cwd=cwd or BACKEND, env=ENV, capture_output=True, text=True,
    )  # fmt: skip


def start(path: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "app.cli", "train", "--config", str(path), *args]
    return subprocess.Popen(
        command, cwd=BACKEND, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert len(steps) == len(set(steps))
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def wait_for_step(run: Path, step: int) -> None:
    while not (run / f"step-{step:08d}").is_dir():
        time.sleep(0.01)


def test_whole_run_by_hand(tmp_path: Path, data: Path) -> None:
    path = write_run_file(tmp_path, data, "run", steps=12)
    done = gpt2("--config", str(path), "--optim.lr", "2e-3", "--sample-tokens", "5")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for wanted in (
        "device", "precision", "fused AdamW", "32 tokens", "2 passes of 2", "first loss",
        "OMP_WAIT_POLICY=PASSIVE", "best validation loss",
        "--- sample at step 12, temperature 0.8 ---", "loss.png", "gpt2 generate",
    ):  # fmt: skip
        assert wanted in out
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    saved = command.parse(["--config", str(tmp_path / "run" / "run.yaml")]).train
    assert saved.optim.lr == 2e-3 and saved.model.vocab_size < 30
    again = gpt2("--config", str(path))
    assert (again.returncode, again.stdout) == (2, "")
    assert re.fullmatch(
        r"error: out=.* already exists and is never .*--resume auto.*\n", again.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
def test_signals_resume_bitwise(tmp_path: Path, data: Path, whole: Path, kills: int) -> None:
    """C2：随机时刻的 SIGTERM 或 SIGINT，退出 0，续上之后与不间断的逐位相等。"""
    source, stopped = random.Random(kills), 0
    path = write_run_file(tmp_path, data, "broken")
    for number in range(kills):
        if (tmp_path / "broken" / f"step-{STEPS:08d}").exists():
            break
        process = start(path, "--resume", "auto")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(source.uniform(0, 0.2))
        process.send_signal([signal.SIGTERM, signal.SIGINT][number % 2])
        out = process.stdout.read()
        assert process.wait() == 0, out
        stopped += "--resume auto" in out
        verify_checkpoint(resolve_checkpoint(tmp_path / "broken"))
    assert stopped
    assert gpt2("--config", str(path), "--resume", "auto").returncode == 0
    assert_same(whole, tmp_path / "broken")


def test_kill_nine_resumes_bitwise(tmp_path: Path, data: Path, whole: Path) -> None:
    path = write_run_file(tmp_path, data, "broken")
    process = start(path)
    wait_for_step(tmp_path / "broken", 10)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    done = gpt2("--config", str(path), "--resume", "auto")
    assert done.returncode == 0 and "took over the lock of process" in done.stdout
    assert_same(whole, tmp_path / "broken")


@pytest.mark.slow
def test_two_trainers(tmp_path: Path, data: Path) -> None:
    """A11"""
    path = write_run_file(tmp_path, data, "run", steps=100_000)
    first = start(path)
    assert first.stdout is not None
    wait_for_step(tmp_path / "run", 5)
    second = gpt2("--config", str(path), "--resume", "auto")
    assert second.returncode == 2 and f"is being trained by process {first.pid}" in second.stderr
    first.send_signal(signal.SIGINT)
    assert "stopped by SIGINT" in first.stdout.read() and first.wait() == 0


def test_help_is_instant_and_english() -> None:
    code = (
        "import sys\n"
        "from app.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BACKEND, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--config" in done.stdout and "--optim.lr" in done.stdout
    assert not re.search(r"[\u4e00-\u9fff]", done.stdout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"bad.yaml: unknown option 'optim.lrr': did you mean 'lr'\?"),
        ("steps: 10\nsteps: 20", r"'steps' is given twice"),
        ("optim: {lr: 1, lr: 2}", r"'lr' is given twice"),
        ("- a", r"must hold a mapping of options, got list"),
        ("a: [", r"is not valid YAML"),
        ("!!python/object/apply:os.system [id]", r"is not valid YAML"),
        ("", r"must hold a mapping of options, got NoneType"),
        ("model: {n_head: 7}", r"n_embed=768 is not a multiple of n_head=7"),
    ],
)
def test_bad_run_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(path))


def test_binary_and_huge_run_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("#" * (1 << 21))
    with pytest.raises(ValueError, match="at most"):
        load_config(str(tmp_path / "b.yaml"))


def test_errors_are_one_line_and_code_two(tmp_path: Path) -> None:
    for args, message in (
        (("--config", "quikstart"), "did you mean 'quickstart'"),
        (("--config", str(tmp_path)), "neither a file nor a recipe"),
        (("--data.folder", str(tmp_path / "none")), "gpt2 prepare"),
    ):
        done = gpt2(*args, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert message in done.stderr and done.stderr.count("\n") == 1
    done = gpt2("--optim.lrr", "1", cwd=tmp_path)
    assert done.returncode == 2 and "--optim.lr FLOAT" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_file_and_the_vocabulary_follows_the_data(
    tmp_path: Path, data: Path
) -> None:
    path = write_run_file(tmp_path, data, "run")
    size = json.loads((data / "train" / "meta.json").read_text())["tokenizer"]["vocab_size"]
    plain = command.parse(
        ["--config", str(path), "--steps", "99", "--optim.betas", "0.8", "0.9"]
    ).train
    assert (plain.steps, plain.optim.lr, plain.optim.betas) == (99, 1e-2, (0.8, 0.9))
    assert plain.model.vocab_size == size and plain.model.n_layer == 2
    for flag in ("--model.vocab-size=50304", "--model.vocab_size=50304"):
        assert command.parse([f"--config={path}", flag]).train.model.vocab_size == 50304


def test_the_run_file_is_read_once_and_checked_little(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """文件一次，配置至多三次：文件的、盖过的、词表合上数据的；原来的设置也在手边。"""
    path = write_run_file(tmp_path, data, "run")
    read, checked = [], []
    real, check = runfile.read_run_file, TrainConfig.__post_init__

    def reading(path: Path) -> dict[str, Any]:
        read.append(path)
        return real(path)

    def checking(config: TrainConfig) -> None:
        checked.append(config)
        check(config)

    monkeypatch.setattr(runfile, "read_run_file", reading)
    monkeypatch.setattr(TrainConfig, "__post_init__", checking)
    args = command.parse(["--config", str(path), "--steps", "99"])
    assert args.file is not None and (args.train.steps, args.file.config.steps) == (99, STEPS)
    assert read == [path] and len(checked) <= 3


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_are_valid(name: str) -> None:
    config = load_config(name).config
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert find_run_file(name) == find_run_file(name + ".yaml")
    assert config.out == f"runs/{name}"


def test_nanogpt_recipe_is_the_published_shape() -> None:
    config = load_config("shakespeare-char-nanogpt").config
    shape, optim = config.model, config.optim
    assert (shape.n_layer, shape.n_head, shape.n_embed, shape.context_size) == (4, 4, 128, 64)
    assert (shape.norm, shape.dropout, config.batch_size, config.steps) == ("pre", 0.0, 12, 2000)
    assert (optim.lr, optim.betas, config.schedule.warmup_steps) == (1e-3, (0.9, 0.99), 100)
    assert optim.lr * config.schedule.min_lr_ratio == pytest.approx(1e-4)


# ---- 成了才算成 ----


@pytest.mark.slow
def test_what_was_not_written_is_no_success(tmp_path: Path, data: Path) -> None:
    """训练做完了，报告却没写成：说出来，退出码不是 0；修好再来一次就是 0。"""
    path = write_run_file(tmp_path, data, "run", steps=12)
    assert gpt2("--config", str(path)).returncode == 0
    report = tmp_path / "run" / "report.html"
    report.unlink()
    (report / "x").mkdir(parents=True)
    more = ("--config", str(tmp_path / "run" / "run.yaml"), "--resume", "auto")
    done = gpt2(*more, "--steps", "14")
    assert done.returncode == 1
    assert "trained and saved, but not written whole: report.html" in done.stdout
    (report / "x").rmdir()
    report.rmdir()
    done = gpt2(*more)
    assert done.returncode == 0 and report.is_file() and "not written" not in done.stdout


@pytest.mark.slow
def test_a_moved_run_goes_on_from_anywhere(tmp_path: Path, data: Path) -> None:
    """真的进程：复制出来的训练从别的文件夹续，原来的一个字节也不动。"""
    path = write_run_file(tmp_path, data, "run", steps=12)
    assert gpt2("--config", str(path)).returncode == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    done = gpt2("--config", "../copy/run.yaml", "--resume", "auto", "--steps", "15",
                cwd=_folder(tmp_path / "elsewhere"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert resolve_checkpoint(tmp_path / "copy").name == "step-00000015"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert "data goes on at window " in done.stdout
    assert "learning rate of the next step (step 13) is " in done.stdout


def _folder(path: Path) -> Path:
    path.mkdir()
    return path

"""几个 rank 训练：同样的位；固定的树比 all_reduce 慢多少；两个进程比两个线程快多少。

cd backend && python -m benchmarks.distributed

三部分可以各自跑：--only bits、sums、cores。计时要在安静的机器上；`gpt2 train` 实跑，取各步的
中位数，两种做法轮流各跑几遍。
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .common import table, write_result

RECIPES = Path(__file__).parents[2] / "recipes"
GPT2 = [sys.executable, "-m", "app.cli"]
QUIET = ["--eval-every", "0", "--sample-tokens", "0", "--save-every", "0", "--precision", "float32"]
TINY = [
    "--model.n-layer", "2", "--model.n-head", "2", "--model.n-embed", "32", "--model.context-size",
    "32", "--batch-size", "8", "--micro-batch", "2", "--schedule.warmup-steps", "5",
]  # fmt: skip
EXPERTS = ["--model.moe-num-experts", "4"]
# 名字、层、宽、批、词元。
SIZES = [("0.5 M", 4, 96, 8, 128), ("2 M", 4, 192, 8, 128), ("11 M", 6, 384, 8, 256)]
SMALL = [
    "--model.n-layer", "12", "--model.n-head", "12", "--model.n-embed", "768",
    "--model.vocab-size", "50304", "--model.context-size", "256", "--batch-size", "4",
    "--micro-batch", "2",
]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--only", choices=["bits", "sums", "cores"])
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--turns", type=int, default=3)
    given = options.parse_args()
    parts = {"bits": bits, "sums": sums, "cores": cores}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        letters = random.Random(0).choices("abcdefgh ", k=200_000)
        (folder / "text.txt").write_text("".join(letters))
        words = ["prepare", str(folder / "text.txt"), "--tokenizer", "chars"]
        subprocess.run(
            [*GPT2, *words, "--out", str(folder / "data")], check=True, capture_output=True
        )
        chosen = [given.only] if given.only else list(parts)
        body = "\n\n".join(parts[part](folder, given.steps, given.turns) for part in chosen)
    command = "cd backend && python -m benchmarks.distributed"
    name = "distributed" if given.only is None else f"distributed_{given.only}"
    write_result(name, command, body)


def train(folder: Path, out: str, *words: str, threads: int = 1) -> Path:
    subprocess.run(
        [*GPT2, "train", "--data.folder", str(folder / "data"), "--out", str(folder / out), *words],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return folder / out


def weights_of(run: Path) -> str:
    newest = sorted(run.glob("step-*"))[-1]
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()[:12]


def step_ms(run: Path, skip: int = 10) -> float:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    seconds = [row["seconds"] for row in rows if row["kind"] == "train"]
    return 1e3 * statistics.median(seconds[min(skip, len(seconds) // 2) :])


def bits(folder: Path, steps: int, turns: int) -> str:
    rows: list[list[object]] = []
    for optim, dropout, experts in itertools.product(("adamw", "muon"), ("0", "0.1"), (0, 4)):
        settings = [*TINY, *QUIET, "--optim.name", optim, "--model.dropout", dropout]
        settings += ["--steps", str(steps)] + (EXPERTS if experts else [])
        name = f"{optim}-{dropout}-{experts}"
        found = [
            weights_of(train(folder, f"{name}-{n}", *settings, "--ranks", str(n)))
            for n in (1, 2, 4)
        ]
        run = str(folder / f"{name}-parts")
        for number, ranks in enumerate((2, 4, 1), start=1):
            # 每次多做三分之一；日程按总步数，所以步数不变，用存下的那一步停住。
            part = train_until(run, [*settings, "--data.folder", str(folder / "data")], ranks,
                               steps * number // 3, steps)  # fmt: skip
        found.append(weights_of(part))
        same = "yes" if len(set(found)) == 1 else "NO"
        rows.append([optim, dropout, experts, *found, same])
    header = ["optimizer", "dropout", "experts", "1 rank", "2", "4", "2, then 4, then 1", "same"]
    return f"## Bits\n\nsha256 of the final weights, {steps} steps.\n\n{table(header, rows)}"


def train_until(out: str, settings: list[str], ranks: int, step: int, last: int) -> Path:
    """做到 step 步就收到 SIGTERM；最后一次做完。"""
    code = (
        "import os, signal, sys\n"
        "from app.cli.main import main\n"
        "from app.training.trainer import Trainer\n"
        "real = Trainer._train_step\n"
        "def train_step(self):\n"
        "    real(self)\n"
        f"    if self.step == {step} != {last}:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "Trainer._train_step = train_step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    script = Path(out).with_suffix(".py")
    script.write_text(code)
    words = ["train", "--out", out, "--resume", "auto", *settings]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run(
        [sys.executable, *launch, str(script), *words],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    )
    return Path(out)


def sums(folder: Path, steps: int, turns: int) -> str:
    rows: list[list[object]] = []
    for (name, layers, width, batch, context), ranks in itertools.product(SIZES, (2, 4)):
        settings = [
            "--model.n-layer", str(layers), "--model.n-embed", str(width), "--model.n-head", "6",
            "--model.context-size", str(context), "--batch-size", str(batch), "--micro-batch", "2",
            "--schedule.warmup-steps", "5", "--steps", str(steps), "--ranks", str(ranks), *QUIET,
        ]  # fmt: skip
        found = compare(
            folder, f"sums-{layers}-{width}-{ranks}", turns,
            {"tree": (settings, 1), "all": ([*settings, "--parallel.no-exact"], 1)},
        )  # fmt: skip
        ratio = f"{found['tree'] / found['all']:.2f}"
        rows.append([name, ranks, f"{found['tree']:.1f}", f"{found['all']:.1f}", ratio])
    header = ["parameters", "ranks", "tree, ms a step", "all_reduce, ms a step", "ratio"]
    return f"## The fixed tree against all_reduce\n\n{table(header, rows)}"


def cores(folder: Path, steps: int, turns: int) -> str:
    rows: list[list[object]] = []
    quickstart = ["--config", str(RECIPES / "quickstart.yaml"), "--schedule.warmup-steps", "5"]
    cases = {
        "Small, 4 x 256": [
            *SMALL,
            "--schedule.warmup-steps",
            "2",
            "--steps",
            str(max(6, steps // 5)),
        ],
        "quickstart": [*quickstart, "--steps", str(steps)],
        "quickstart, micro-batch 4": [*quickstart, "--micro-batch", "4", "--steps", str(steps)],
    }
    for name, settings in cases.items():
        # 一个进程一次前向整批，是它最快的办法。
        plain = [*settings, "--micro-batch", "None"]
        found = compare(
            folder, f"cores-{name.split(',')[0]}-{len(rows)}", turns,
            {
                "threads": ([*plain, *QUIET], 2),
                "ranks": ([*settings, *QUIET, "--ranks", "2"], 1),
            },
        )  # fmt: skip
        ratio = f"{found['threads'] / found['ranks']:.2f}"
        rows.append([name, f"{found['threads']:.1f}", f"{found['ranks']:.1f}", ratio])
    header = ["what", "1 process, 2 threads, ms a step", "2 ranks, 1 thread, ms a step", "faster"]
    return f"## Two cores: two ranks against two threads\n\n{table(header, rows)}"


def compare(
    folder: Path, name: str, turns: int, ways: dict[str, tuple[list[str], int]]
) -> dict[str, float]:
    """轮流各跑 turns 遍，各取一步用时中位数里最好的一遍（毫秒）。"""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns):
        for way, (words, threads) in ways.items():
            run = train(folder, f"{name}-{way}-{turn}", *words, threads=threads)
            found[way].append(step_ms(run))
    return {way: min(values) for way, values in found.items()}


if __name__ == "__main__":
    main()

"""几个 rank 训练：同样的位；固定的树比 all_reduce 慢多少；两个进程比两个线程快多少。

cd backend && python -m benchmarks.distributed

三部分各写一张表，可以各自跑：--only bits、sums、cores；每一行一出来就印。计时要在安静的机器上：
`gpt2 train` 实跑，取各步的中位数，两种做法轮流各跑几遍。
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
QUIET = [
    "--eval-every", "0", "--eval-batches", "1", "--sample-tokens", "0", "--save-every", "0",
    "--precision", "float32", "--compile", "off",
]  # fmt: skip
TINY = [
    "--model.n-layer", "2", "--model.n-head", "2", "--model.n-embed", "32", "--model.context-size",
    "32", "--batch-size", "8", "--micro-batch", "2", "--schedule.warmup-steps", "5",
]  # fmt: skip
EXPERTS = ["--model.moe-num-experts", "4"]
# 名字、层、宽、批、词元。
SIZES = [("0.5 M", 4, 96, 8, 128), ("2 M", 4, 192, 8, 128), ("11 M", 6, 384, 8, 256)]
RANKS = {
    "1 rank": ["--ranks", "1"],
    "2": ["--ranks", "2"],
    "4": ["--ranks", "4"],
    "shard 2": ["--ranks", "2", "--parallel.shard", "2"],
    "shard 2 x replicate 2": ["--ranks", "4", "--parallel.shard", "2", "--parallel.replicate", "2"],
}
SMALL = [
    "--model.n-layer", "12", "--model.n-head", "12", "--model.n-embed", "768",
    "--model.vocab-size", "50304", "--model.context-size", "256", "--batch-size", "4",
    "--micro-batch", "2", "--schedule.warmup-steps", "2",
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
        for part in [given.only] if given.only else parts:
            command = f"cd backend && python -m benchmarks.distributed --only {part}"
            write_result(f"distributed_{part}", command, parts[part](folder, given))


def said(rows: list[list[object]], row: list[object]) -> None:
    print(*row, sep=" | ", file=sys.stderr, flush=True)
    rows.append(row)


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


def bits(folder: Path, given: argparse.Namespace) -> str:
    rows: list[list[object]] = []
    steps = given.steps
    for optim, experts in itertools.product(("adamw", "muon"), (0, 4)):
        settings = [*TINY, *QUIET, "--optim.name", optim, "--model.dropout", "0.1"]
        settings += ["--steps", str(given.steps)] + (EXPERTS if experts else [])
        found = [
            weights_of(train(folder, f"{optim}-{experts}-{number}", *settings, *ranks))
            for number, ranks in enumerate(RANKS.values())
        ]
        run = str(folder / f"{optim}-{experts}-parts")
        for number, count in enumerate((2, 4, 1), start=1):
            # 每次多做三分之一；日程按总步数，所以步数不变，用存下的那一步停住。
            part = train_until(run, [*settings, "--data.folder", str(folder / "data")], count,
                               steps * number // 3, steps)  # fmt: skip
        found.append(weights_of(part))
        said(rows, [optim, experts, *found, "yes" if len(set(found)) == 1 else "NO"])
    header = ["optimizer", "experts", *RANKS, "2, then 4, then 1", "same"]
    return f"sha256 of the final weights, {steps} steps, dropout 0.1.\n\n{table(header, rows)}"


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


def sums(folder: Path, given: argparse.Namespace) -> str:
    rows: list[list[object]] = []
    for (name, layers, width, batch, context), ranks in itertools.product(SIZES, (2, 4)):
        settings = [
            "--model.n-layer", str(layers), "--model.n-embed", str(width), "--model.n-head", "6",
            "--model.context-size", str(context), "--batch-size", str(batch), "--micro-batch", "2",
            "--schedule.warmup-steps", "5", "--steps", str(given.steps), "--ranks", str(ranks),
            *QUIET,
        ]  # fmt: skip
        found = compare(
            folder, f"sums-{layers}-{width}-{ranks}", given.turns,
            {"tree": (settings, 1), "all": ([*settings, "--parallel.no-exact"], 1)},
        )  # fmt: skip
        ratio = f"{found['tree'] / found['all']:.2f}"
        said(rows, [name, ranks, f"{found['tree']:.1f}", f"{found['all']:.1f}", ratio])
    header = ["parameters", "ranks", "tree, ms a step", "all_reduce, ms a step", "ratio"]
    return table(header, rows)


def cores(folder: Path, given: argparse.Namespace) -> str:
    rows: list[list[object]] = []
    steps = str(given.steps)
    quickstart = ["--config", str(RECIPES / "quickstart.yaml"), "--schedule.warmup-steps", "5"]
    cases = {
        "Small, 4 x 256": [*SMALL, "--steps", str(max(6, given.steps // 5))],
        "quickstart": [*quickstart, "--steps", steps],
        "quickstart, micro-batch 4": [*quickstart, "--micro-batch", "4", "--steps", steps],
    }
    for name, settings in cases.items():
        # 一个进程一次前向整批，是它最快的办法。
        plain = [*settings, "--micro-batch", "None"]
        found = compare(
            folder, f"cores-{name.split(',')[0]}-{len(rows)}", given.turns,
            {
                "threads": ([*plain, *QUIET], 2),
                "ranks": ([*settings, *QUIET, "--ranks", "2"], 1),
            },
        )  # fmt: skip
        ratio = f"{found['threads'] / found['ranks']:.2f}"
        said(rows, [name, f"{found['threads']:.1f}", f"{found['ranks']:.1f}", ratio])
    header = ["what", "1 process, 2 threads, ms a step", "2 ranks, 1 thread, ms a step", "faster"]
    return table(header, rows)


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

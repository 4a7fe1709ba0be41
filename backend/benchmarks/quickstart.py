"""快速开始的配方怎样选：同样的训练时间，换一样，留出的文件上每字节几比特。

cd backend && python -m benchmarks.quickstart

先在一个进程里轮流走，量各做法一步的时间；再按它给每个做法同样多秒的步数，各训练几个种子。
这样训练时机器忙不忙与结果无关，只有第一部分要安静。
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from app.cli.shared.runfile import load_config
from app.training.config import TrainConfig

from .common import interleaved, table, write_result
from .training_step import stepper

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
# 从前的配方；它的 900 步用的时间，就是每个做法得到的。
BEFORE = "AdamW, learned positions, GELU"
BEFORE_STEPS = 900
PLAIN = {
    "model.n_layer": 4, "model.position": "learned", "model.qk_norm": False, "model.bias": True,
    "model.activation": "gelu_tanh", "optim.name": "adamw", "optim.lr": 3e-3,
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 100, "schedule.min_lr_ratio": 0.05,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    BEFORE: PLAIN,
    "AdamW for Muon, lr 3e-3": {"optim.name": "adamw", "optim.lr": 3e-3},
    "learned positions": {"model.position": "learned"},
    "no qk_norm": {"model.qk_norm": False},
    "GELU": {"model.activation": "gelu_tanh"},
    "keel": {"model.norm": "keel"},
    "cosine": {"schedule.kind": "cosine"},
    "lr 4e-3": {"optim.lr": 4e-3},
    "lr 1.6e-2": {"optim.lr": 1.6e-2},
    "batch 4": {"batch_size": 4},
    "batch 16": {"batch_size": 16},
    "4 windows of 256": {"batch_size": 4, "model.context_size": 256},
    "16 windows of 64": {"batch_size": 16, "model.context_size": 64},
    "vocabulary 1,024": {"vocab": 1024},
    "vocabulary 2,048": {"vocab": 2048},
    "width 128": {"model.n_embed": 128},
    "width 256": {"model.n_embed": 256},
    "1 layer": {"model.n_layer": 1},
    "3 layers": {"model.n_layer": 3},
    "4 layers": {"model.n_layer": 4},
    "bfloat16": {"precision": "bfloat16"},
}
VOCAB = 4096
EVAL_TOKENS = 160 * 1024


def changed(changes: dict[str, Any]) -> TrainConfig:
    data = load_config(str(RECIPE)).config.to_dict()
    data["model"]["vocab_size"] = changes.get("vocab", VOCAB)
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        if name != "vocab":
            (data[section] if section else data)[key] = value
    return TrainConfig.from_dict(data)


def prepared(work: Path, vocab: int) -> Path:
    """标准库语料，词表 vocab；留着给下一次。"""
    folder = work / f"stdlib-{vocab}"
    command = ["prepare", "--out", str(folder), "--vocab-size", str(vocab)]
    subprocess.run([sys.executable, "-m", "app.cli", *command], check=True, capture_output=True)
    return folder


def words_of(changes: dict[str, Any]) -> list[str]:
    words = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if name == "vocab":
            continue
        if isinstance(value, bool):
            section, _, key = flag.rpartition(".")
            words.append(f"--{section}.{'' if value else 'no-'}{key}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def trained(work: Path, changes: dict[str, Any], steps: int, seed: int) -> float:
    """每字节几比特：验证损失（nat 每词元）乘每字节的词元数。"""
    config = changed(changes)
    data = prepared(work, changes.get("vocab", VOCAB))
    batch = config.batch_size * config.model.context_size
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        subprocess.run(
            [
                sys.executable, "-m", "app.cli", "train", "--config", str(RECIPE),
                "--data.folder", str(data), "--out", str(run), *words_of(changes),
                "--steps", str(steps), "--seed", str(seed), "--eval-every", str(steps),
                "--eval-batches", str(EVAL_TOKENS // batch), "--sample-every", str(steps),
                "--sample-tokens", "0", "--save-every", str(steps),
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        loss = [line["loss"] for line in lines if line["kind"] == "eval"][-1]
    val = json.loads((data / "prepare.json").read_text())["sides"]["val"]
    return loss / math.log(2) * val["tokens"] / val["bytes"]


def step_times(names: list[str], rounds: int, kept: Path) -> dict[str, float]:
    """一步几秒；量过的从 kept 里取，训练就可以分几次跑。"""
    known: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    if known.keys() >= set(names):
        return known
    times = interleaved({name: stepper(changed(WAYS[name])) for name in names}, rounds)
    kept.write_text(json.dumps(times, indent=1))
    return times


def kept_bits(work: Path, name: str, steps: int, seed: int) -> float:
    """训练过的不再训练。"""
    path, key = work / "bits.json", f"{name}, {steps} steps, seed {seed}"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known[key] = trained(work, WAYS[name], steps, seed)
        path.write_text(json.dumps(known, indent=1))
    return known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--work", type=Path, default=None, help="keeps data, times and results")
    args = parser.parse_args()
    torch.set_num_threads(2)
    names = list(dict.fromkeys(["the recipe", BEFORE, *args.ways]))
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        times = step_times(names, args.rounds, work / "times.json")
        budget = BEFORE_STEPS * times[BEFORE]
        for name in names:
            steps = round(budget / times[name])
            found = [kept_bits(work, name, steps, seed) for seed in args.seeds]
            bits = ", ".join(f"{value:.3f}" for value in found)
            rows.append([name, f"{1e3 * times[name]:.0f}", steps, bits])
            rows[-1].append(f"{statistics.mean(found):.3f}")
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: str(row[-1]))
    header = ["what is changed", "ms a step", "steps", "bits per byte, a seed each", "mean"]
    note = (
        f"\n\nEach way trains for as many steps as fit into the time of {BEFORE_STEPS} steps of "
        f"the first recipe ({BEFORE}): {budget:.0f} s here, by step times that are medians of "
        f"{args.rounds} rounds, the ways taking turns. Bits per byte of windows spread over the "
        f"held-out files, {EVAL_TOKENS:,} tokens."
    )
    command = "cd backend && python -m benchmarks.quickstart"
    write_result("quickstart", command, table(header, rows) + note)


if __name__ == "__main__":
    main()

"""tinyshakespeare 字符：nanoGPT 的 CPU 配置、同形状的我们、我们的配方，一个接一个在同一台机器上跑。

cd backend && python -m benchmarks.shakespeare tinyshakespeare.txt --nanogpt DIR --seeds 1337 1 2

nanoGPT 由运行的人自己克隆在旁边；不给就只跑我们的两个。它的种子写死在 train.py 里，只跑一次。
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.models.transformer import GPT2Config, GPT2Model
from app.training.saving.checkpoint import resolve_checkpoint

from .common import table, write_result

# 验证几次：每次要走完整个验证集，算在总时间里。
GOAL, CHECKS = 1.88, 16
RUNS = ["shakespeare-char-nanogpt", "shakespeare-char"]
RECIPES = Path(__file__).parents[2] / "recipes"
# nanoGPT 的 README 里“我只有一台笔记本”的命令。
NANOGPT = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--recipes", nargs="+", default=RUNS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="of our runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run_all(args, Path(folder))
    header = ["what", "seed", "parameters", "context", "tokens", "wall s", "training s"]
    header += [f"training s to {GOAL}", "of nanoGPT's training", "validation loss"]
    body = table(header, rows) + (
        "\n\nValidation loss: the whole last tenth of the text in windows of the model's own "
        "context, the same for all. nanoGPT's README reports 1.88 for its run (20 random batches). "
        f"Wall: the whole program, ours with {CHECKS} validations over the whole split to see when "
        "it gets there; training: the steps alone."
    )
    chosen, seeds = " ".join(args.recipes), " ".join(map(str, args.seeds))
    command = "python -m benchmarks.shakespeare tinyshakespeare.txt --nanogpt ../../nanoGPT"
    whole = f"cd backend && {command} --recipes {chosen} --seeds {seeds}"
    write_result("shakespeare", whole, body)


def run_all(args: argparse.Namespace, folder: Path) -> list[list[object]]:
    gpt2 = [sys.executable, "-m", "app.cli"]
    data, text = folder / "data" / "shakespeare-char", args.text.resolve()
    call([*gpt2, "prepare", text, "--tokenizer", "chars", "--out", data], folder)
    rows, theirs = [], None
    if args.nanogpt is not None:
        found, theirs = run_nanogpt(text, args.nanogpt, folder)
        rows.append(found)
    for recipe, seed in itertools.product(args.recipes, args.seeds):
        config, out = RECIPES / f"{recipe}.yaml", folder / f"{recipe}-{seed}"
        run = yaml(config)
        options = {
            "--config": config, "--out": out, "--data.folder": data, "--seed": seed,
            "--eval-every": run["steps"] // CHECKS, "--sample-tokens": 0, "--save-every": 0,
        }  # fmt: skip
        seconds = call([*gpt2, "train", *itertools.chain(*options.items())], folder)
        model = GPT2Model.from_pretrained(resolve_checkpoint(out))
        ids = np.fromfile(data / "val" / "tokens-00000.bin", np.uint16)
        tokens = run["steps"] * run["batch_size"] * model.config.context_size
        training, reached = training_times(out / "metrics.jsonl")
        share = "" if theirs is None or reached is None else f"{reached / theirs:.2f}x"
        name = f"`gpt2 train --config {recipe}`"
        times = (seconds, training, reached, share)
        rows.append(row(name, seed, model, ids, tokens, times))
    return rows


def training_times(metrics: Path) -> tuple[float, float | None]:
    """(各步之和, 整个验证集的损失首次到 GOAL 时的)，秒；没有到就是 None。"""
    spent, reached = 0.0, None
    for line in metrics.read_text().splitlines():
        found = json.loads(line)
        if found["kind"] == "train":
            spent += found["seconds"]
        if found["kind"] == "eval" and found["loss"] <= GOAL and reached is None:
            reached = spent
    return spent, reached


def run_nanogpt(text: Path, clone: Path, folder: Path) -> tuple[list[object], float]:
    """(表里的一行, 各步之和的秒数)。"""
    copy = folder / "nanoGPT"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(text, copy / "data" / "shakespeare_char" / "input.txt")
    call([sys.executable, "data/shakespeare_char/prepare.py"], copy)
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--always_save_checkpoint=True"],
        cwd=copy, check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    # 每 250 步的那一行连它的验证也算在内：用中位数代替。
    each = [float(ms) / 1e3 for ms in re.findall(r"iter \d+: .*time ([\d.]+)ms", done.stdout)]
    usual = statistics.median(each)
    training = sum(min(one, 3 * usual) for one in each)
    saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = GPT2Model(
        GPT2Config(
            vocab_size=65, context_size=64, n_layer=4, n_head=4, n_embed=128,
            norm="pre", bias=False, dropout=0.0, activation="gelu",
        )
    )  # fmt: skip
    model.load_state_dict(renamed(saved["model"]))
    ids = np.fromfile(copy / "data" / "shakespeare_char" / "val.bin", np.uint16)
    times = (seconds, training, None, "")
    found = row("nanoGPT `train.py`", 1337, model.eval(), ids, 2000 * 12 * 64, times)
    return found, training


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name != "lm_head.weight":
            result[f"embed.{name}" if name.startswith(("wte", "wpe")) else name] = tensor
    return result


def row(
    name: str, seed: int, model: GPT2Model, ids: np.ndarray, tokens: int,
    times: tuple[float, float, float | None, str],
) -> list[object]:  # fmt: skip
    """times：整个程序、各步之和、到 GOAL 时的各步之和（秒），后者是 nanoGPT 的各步之和的几倍。"""
    loss = validation(model, torch.from_numpy(ids.astype(np.int64)))
    seconds, training, reached, share = times
    context = model.config.context_size
    return [name, seed, f"{model.num_parameters():,}", context, f"{tokens:,}", f"{seconds:.0f}",
            f"{training:.0f}", "not reached" if reached is None else f"{reached:.0f}", share,
            f"{loss:.4f}"]  # fmt: skip


@torch.no_grad()
def validation(model: GPT2Model, ids: torch.Tensor) -> float:
    length = model.config.context_size
    count = (len(ids) - 1) // length
    x = ids[: count * length].view(count, length)
    y = ids[1 : count * length + 1].view(count, length)
    pairs = zip(x.split(64), y.split(64), strict=True)
    total = sum(model(a, targets=b)["loss"].item() * len(a) for a, b in pairs)
    return total / count


def yaml(path: Path) -> dict[str, Any]:
    import yaml as library

    return library.safe_load(path.read_text(encoding="utf-8"))


def call(command: list[object], cwd: Path) -> float:
    start = time.perf_counter()
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

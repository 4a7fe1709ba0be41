"""换掉注意力的图样，损失、时间、内存各差多少：同样的模型、数据、词元数，两个种子。

cd backend && python -m benchmarks.sparse_quality tinyshakespeare.txt

每次训练各在自己的进程里，一个线程，计处理器时间：旁边有别的程序也不影响比较。
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig, ScheduleConfig
from app.training.optim.build import build_optimizer
from app.training.optim.schedule import learning_rate

from .common import table, write_result
from .deep_norms import load

LENGTH, BATCH, STEPS, PEAK = 512, 4, 300, 3e-3
SCHEDULE = ScheduleConfig(warmup_steps=30, min_lr_ratio=0.1)
SHAPE = {"n_layer": 4, "n_head": 4, "n_embed": 128, "norm": "pre", "dropout": 0.0}
# 稀疏的几个每个查询看的键数相近（约 60 个），full 平均 256 个。
PATTERNS: dict[str, str | list[str]] = {
    "full": "causal",
    "local + global": "local(56) | global(8)",
    "local + global, every 2nd layer full": ["local(56) | global(8)", "causal"],
    "fixed": "fixed(48, 6)",
    "strided (merged head)": "local(52) | strided(32)",
    "strided alone": "strided(4)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="internal: one training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(train(args.text, args.one[0], int(args.one[1]))))
        return
    rows: list[list[object]] = []
    first = None
    for name, pattern in PATTERNS.items():
        runs = [apart(args.text, name, seed) for seed in args.seeds]
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        first = first or seconds
        rows.append(
            [
                name,
                ", ".join(pattern) if isinstance(pattern, list) else pattern,
                *(f"{run['loss']:.3f}" for run in runs),
                f"{seconds / STEPS * 1e3:.0f}",
                f"{first / seconds:.2f}x",
                f"{max(run['peak'] for run in runs) / 2**20:.0f}",
            ]
        )
        print(rows[-1], flush=True)
    head = [
        "attention", "pattern", *(f"val, seed {s}" for s in args.seeds),
        "ms a step", "speed", "peak, MiB",
    ]  # fmt: skip
    body = table(head, rows) + (
        f"\n\nCharacters of tinyshakespeare, context {LENGTH}, {SHAPE['n_layer']} layers of width "
        f"{SHAPE['n_embed']}, RoPE, {STEPS} steps of {BATCH} x {LENGTH} tokens, peak learning rate "
        f"{PEAK:g}; validation over the whole held-out tenth in windows of {LENGTH}. Milliseconds "
        "are processor time on one thread for a whole training step; the peak is what training "
        "added to the resident memory."
    )
    command = "cd backend && python -m benchmarks.sparse_quality tinyshakespeare.txt"
    write_result("sparse_quality", command, body)


def apart(text: Path, name: str, seed: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.sparse_quality", str(text)]
    done = subprocess.run(
        [*command, "--one", name, str(seed)], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def train(text: Path, name: str, seed: int) -> dict[str, float]:
    ids, held_out, vocab = load(text)
    torch.manual_seed(seed)
    config = {**SHAPE, "vocab_size": vocab, "context_size": LENGTH, "position": "rope"}
    model = GPT2Model(GPT2Config.from_dict({**config, "attention_pattern": PATTERNS[name]}))
    optimizer, _ = build_optimizer(model, OptimConfig(lr=PEAK, weight_decay=0.1))
    generator = torch.Generator().manual_seed(seed)
    before, begin = resident("VmRSS"), time.process_time()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=PEAK, steps=STEPS, schedule=SCHEDULE)
        start = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
        window = ids[start + torch.arange(LENGTH + 1)]
        model(window[:, :-1].contiguous(), targets=window[:, 1:].contiguous())["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds, peak = time.process_time() - begin, resident("VmHWM") - before
    return {"loss": validate(model, held_out), "seconds": seconds, "peak": peak}


@torch.no_grad()
def validate(model: GPT2Model, held_out: Tensor) -> float:
    model.eval()
    usable = (len(held_out) - 1) // LENGTH * LENGTH
    x, y = (held_out[i : i + usable].view(-1, LENGTH) for i in (0, 1))
    losses = [model(a, targets=b)["loss"] for a, b in zip(x.split(4), y.split(4), strict=True)]
    sizes = torch.tensor([len(a) for a in x.split(4)])
    return float((torch.stack(losses) * sizes).sum() / sizes.sum())


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024


if __name__ == "__main__":
    main()

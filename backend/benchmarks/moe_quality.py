"""混合专家与稠密：同样的活跃乘法、同样的词元数，损失、均衡与每步时间；抄来的专家与从头训练的。

cd backend && python -m benchmarks.moe_quality FOLDER

FOLDER 是 `gpt2 prepare` 写的数据集。每次训练各在自己的进程里，一个线程，计处理器时间：旁边有别的
程序也不影响比较。各自的结果存在 --cache 里，断了再跑只补缺的。
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.data.sampler import Sampler
from app.data.shards import TokenDataset
from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.models.transformer.experts.moe import MoE
from app.models.transformer.experts.upcycle import upcycle
from app.training.config import OptimConfig, ScheduleConfig
from app.training.optim.build import build_optimizer
from app.training.optim.schedule import learning_rate

from .common import table, write_result

BATCH, STEPS, MANY, FURTHER, PEAK = 8, 240, 900, 120, 3e-3
RATE = 0.01
SHAPE: dict[str, Any] = {
    "n_layer": 4, "n_head": 4, "n_embed": 192, "context_size": 128, "norm": "pre", "dropout": 0.0,
}  # fmt: skip
AUX = MoEConfig()
FREE = MoEConfig(router="sigmoid", aux_loss_coef=0.0, z_loss_coef=0.0, bias_update_rate=RATE)
WIDE = MoEConfig(hidden=4 * SHAPE["n_embed"])
EQUAL: dict[str, MoEConfig | None] = {
    "dense": None,
    "8 experts, auxiliary loss": AUX,
    "8 experts, loss-free balance": FREE,
}
# 训练得久一些：每个专家只见到四分之一的词元，起初吃亏。
LONGER = {f"{name}, {MANY} steps": moe for name, moe in list(EQUAL.items())[:2]}
# 都读同样的 FURTHER 步新数据；前两个从 dense 的权重出发。
ONWARD: dict[str, MoEConfig | None] = {
    "dense, going on": None,
    "upcycled": WIDE,
    "upcycled, noise 0.1": WIDE,
    "from scratch": WIDE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/moe_quality"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help="internal: one training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.one:
        train(args.data, args.cache, args.one[0], int(args.one[1]))
        return
    found = {
        (name, seed): apart(args.data, args.cache, name, seed)
        for seed in args.seeds
        for name in (*EQUAL, *LONGER, *ONWARD)
    }
    report(found, args.seeds)


def apart(data: Path, cache: Path, name: str, seed: int) -> dict[str, Any]:
    file = place(cache, name, seed).with_suffix(".json")
    if not file.is_file():
        command = [sys.executable, "-m", "benchmarks.moe_quality", str(data), "--cache", str(cache)]
        subprocess.run([*command, "--one", name, str(seed)], check=True)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def place(cache: Path, name: str, seed: int) -> Path:
    return cache / f"{name.replace(', ', '-').replace(' ', '-').replace('.', '')}-{seed}"


def train(folder: Path, cache: Path, name: str, seed: int) -> None:
    data = TokenDataset.open(folder / "train")
    moe, onward = {**EQUAL, **LONGER, **ONWARD}[name], name in ONWARD
    base = GPT2Config(vocab_size=data.vocab_size, **SHAPE)
    config = base if moe is None else base.replace(moe_num_experts=8, moe=moe)
    torch.manual_seed(seed)
    model = GPT2Model(config)
    if onward and name != "from scratch":
        dense = GPT2Model.from_pretrained(place(cache, "dense", seed)).state_dict()
        noise = 0.1 if "noise" in name else 0.0
        new = dense if moe is None else upcycle(dense, base, config, seed=seed, noise=noise)
        model.load_state_dict(new)
    steps, first = (FURTHER, STEPS) if onward else (MANY if name in LONGER else STEPS, 0)
    optimizer, _ = build_optimizer(model, OptimConfig(lr=PEAK))
    schedule = ScheduleConfig(warmup_steps=30, min_lr_ratio=0.05)
    sampler = Sampler(data.n_tokens, config.context_size, BATCH, seed)
    start = validate(model, folder)
    begin, passed = time.process_time(), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=PEAK, steps=steps, schedule=schedule)
        inputs, targets = (torch.from_numpy(x) for x in sampler.batch(data, first + step))
        out = model(inputs, targets=targets)
        loss = out["loss"]
        (loss + out["aux_loss"] if "aux_loss" in out else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if moe is not None and moe.bias_update_rate:
            balance(model, out["expert_load"])
    facts = {
        "cpu": (time.process_time() - begin) / steps,
        "wall": (time.perf_counter() - passed) / steps,
        "start": start["loss"],
        "parameters": model.num_parameters(),
        "active": model.active_parameters(),
        **validate(model, folder),
    }
    path = place(cache, name, seed)
    model.save_pretrained(path)
    path.with_suffix(".json").write_text(json.dumps(facts))
    print(name, seed, facts, flush=True)


@torch.no_grad()
def balance(model: GPT2Model, load: Tensor) -> None:
    """b += u·sign(平均 - 负载)（arXiv:2408.15664, 式 4）。"""
    for row, layer in zip(load.double(), model.config.moe_layers, strict=True):
        block = model.h[str(layer)].mlp
        assert isinstance(block, MoE) and block.router.selection_bias is not None
        block.router.selection_bias += RATE * (row.mean() - row).sign().float()


@torch.no_grad()
def validate(model: GPT2Model, folder: Path, rows: int = 320) -> dict[str, float]:
    """均匀铺开的 rows 个窗口；MaxVio = 最忙的专家 / 平均 - 1，各层的最大与平均。"""
    data, size = TokenDataset.open(folder / "val"), model.config.context_size
    starts = torch.linspace(0, data.n_tokens - size - 1, rows).long().tolist()
    windows = torch.stack([torch.as_tensor(data.read(s, size + 1)) for s in starts]).long()
    model.eval()
    losses, load = [], torch.zeros(())
    for block in windows.split(16):
        out = model(block[:, :-1].contiguous(), targets=block[:, 1:].contiguous())
        losses.append(out["loss"])
        load = load + out["expert_load"].double() if "expert_load" in out else load
    model.train()
    facts = {"loss": float(torch.stack(losses).mean())}
    if load.dim():
        vio = load.max(1).values / load.mean(1) - 1
        facts |= {"vio": float(vio.mean()), "worst": float(vio.max())}
    return facts


def report(found: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> None:
    def rows(names: dict[str, Any], base: str) -> list[list[object]]:
        return [
            [
                name,
                f"{runs[0]['parameters'] / 1e6:.1f} / {runs[0]['active'] / 1e6:.1f}",
                *(f"{run['start']:.3f}" for run in runs if names is ONWARD),
                *(f"{run['loss']:.3f}" for run in runs),
                f"{mean(runs, 'loss') - mean(bases, 'loss'):+.3f}",
                "" if "vio" not in runs[0] else f"{mean(runs, 'vio'):.2f} ({worst:.2f})",
                f"{mean(runs, 'cpu') * 1e3:.0f}",
                f"{mean(runs, 'cpu') / mean(bases, 'cpu'):.2f}x",
            ]
            for name in names
            for runs in [[found[name, s] for s in seeds]]
            for bases in [[found[base, s] for s in seeds]]
            for worst in [max(run.get("worst", 0.0) for run in runs)]
        ]

    head = ["model", "parameters / active, M"]
    losses = [f"val, seed {s}" for s in seeds]
    tail = ["against the first", "MaxVio, mean of layers (worst)", "CPU ms a step", "time"]
    tokens = BATCH * SHAPE["context_size"]
    body = (
        f"Equal active products, equal tokens: {STEPS} steps of {tokens} tokens.\n\n"
        + table([*head, *losses, *tail], rows(EQUAL, "dense"))
        + "\n\n"
        + table([*head, *losses, *tail], rows(LONGER, f"dense, {MANY} steps"))
        + f"\n\nEqual further tokens: {FURTHER} steps after the dense run's {STEPS}, on the "
        "batches that follow; from scratch has seen only these. Experts as wide as the dense MLP, "
        "so top-2 multiplies twice as much in these layers.\n\n"
        + table(
            [*head, *(f"before, seed {s}" for s in seeds), *losses, *tail],
            rows(ONWARD, "dense, going on"),
        )
        + f"\n\nThe quickstart's shape ({SHAPE['n_layer']} layers of width {SHAPE['n_embed']}, "
        f"context {SHAPE['context_size']}) and data, fewer steps, peak learning rate {PEAK:g}; 8 "
        f"experts, top-2; loss-free balance moves its bias by {RATE:g} a step. Validation over 320 "
        "windows spread over the held-out files, MaxVio over the same tokens. Milliseconds are "
        "processor time on one thread for a whole step."
    )
    write_result("moe_quality", "cd backend && python -m benchmarks.moe_quality data/stdlib", body)


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


if __name__ == "__main__":
    main()

"""深的 Post-LN 能不能训练：24 层、宽 64、300 步、学习率 3e-3，各种归一化位置，两个种子。

cd backend && python -m benchmarks.deep_norms tinyshakespeare.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig, ScheduleConfig
from app.training.optim.build import build_optimizer
from app.training.optim.schedule import learning_rate

from .common import table, write_result

STEPS, PEAK, BATCH, LENGTH = 300, 3e-3, 8, 64
PLOT = Path(__file__).parents[2] / "docs" / "images" / "deep-norms.png"
SCHEDULE = ScheduleConfig(warmup_steps=30, min_lr_ratio=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--norms", nargs="+", default=["pre", "keel", "deepnorm", "post"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, held_out, vocab = load(args.text)
    unigram = unigram_loss(train, held_out, vocab)
    curves: dict[tuple[str, int], list[float]] = {}
    rows = []
    for norm in args.norms:
        values = []
        for seed in args.seeds:
            curve, value = run(norm, seed, args.depth, vocab, train, held_out)
            curves[norm, seed] = curve
            values.append(value)
            print(f"{norm} seed {seed}: {value:.3f}", flush=True)
        rows.append([norm, *(f"{v:.3f}" for v in values), verdict(max(values), unigram)])
    body = table(["norm", *(f"val, seed {s}" for s in args.seeds), "verdict"], rows)
    body += f"\n\nThe unigram plateau (knowing only letter frequencies) is {unigram:.3f}."
    command = "cd backend && python -m benchmarks.deep_norms tinyshakespeare.txt"
    plot(curves, unigram, args.depth, args.plot)
    write_result("deep_norms", command, body)


def load(path: Path) -> tuple[Tensor, Tensor, int]:
    text = path.read_text(encoding="utf-8")
    order = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([order[c] for c in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(order)


def unigram_loss(train: Tensor, held_out: Tensor, vocab: int) -> float:
    share = torch.bincount(train, minlength=vocab).double() / len(train)
    return -share.clamp(min=1e-9).log()[held_out].mean().item()


def batch(ids: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(ids) - LENGTH, (rows, 1), generator=generator)
    window = ids[start + torch.arange(LENGTH + 1)]
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def run(
    norm: str, seed: int, depth: int, vocab: int, train: Tensor, held_out: Tensor
) -> tuple[list[float], float]:
    torch.manual_seed(seed)
    data = {"vocab_size": vocab, "context_size": LENGTH, "n_layer": depth, "n_head": 4}
    model = GPT2Model(GPT2Config.from_dict({**data, "n_embed": 64, "norm": norm, "dropout": 0.0}))
    optimizer, _ = build_optimizer(model, OptimConfig(lr=PEAK, weight_decay=0.1))
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=PEAK, steps=STEPS, schedule=SCHEDULE)
        x, y = batch(train, BATCH, generator)
        loss = model(x, targets=y)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append(loss.item())
    model.eval()
    fixed = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        values = [
            model(x, targets=y)["loss"].item()
            for x, y in (batch(held_out, BATCH, fixed) for _ in range(20))
        ]
    return curve, sum(values) / len(values)


def verdict(value: float, unigram: float) -> str:
    return "stuck on the unigram plateau" if value > unigram - 0.15 else "trains"


def plot(
    curves: dict[tuple[str, int], list[float]], unigram: float, depth: int, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"pre": "tab:blue", "keel": "tab:green", "deepnorm": "tab:orange", "post": "tab:red"}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (norm, seed), curve in curves.items():
        smooth = [sum(curve[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(curve))]
        style = {"color": colours[norm], "alpha": 1.0 if seed == 0 else 0.5}
        axes.plot(range(1, STEPS + 1), smooth, label=f"{norm}, seed {seed}", **style)
    axes.axhline(unigram, color="grey", linestyle="--", linewidth=1, label="unigram plateau")
    axes.set(xlabel="step", ylabel="training loss (mean of 10)", ylim=(2.2, 4.4))
    axes.set_title(f"{depth} layers, width 64, peak learning rate {PEAK:g}")
    axes.legend(ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

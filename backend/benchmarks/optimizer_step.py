"""一步里优化器占多少：两个小配方的模型，AdamW、Muon，与 Muon 处处在 X 上迭代的写法。

cd backend && python -m benchmarks.optimizer_step
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import yaml

from app.models.transformer import GPT2Model
from app.training.config import TrainConfig
from app.training.optim import muon
from app.training.optim.build import build_optimizer

from .common import interleaved, table, write_result

RECIPES = Path(__file__).parents[2] / "recipes"


def measure(name: str, vocab: int, rounds: int) -> list[object]:
    data = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(data)
    torch.manual_seed(0)
    model = GPT2Model(config.model.replace(vocab_size=vocab))
    size = (config.batch_size, config.model.context_size + 1)
    x = torch.randint(0, vocab, size)

    def gradients() -> None:
        model(x[:, :-1].contiguous(), targets=x[:, 1:].contiguous())["loss"].backward()

    gradients()
    settings = [replace(config.optim, name=one) for one in ("adamw", "muon")]
    adamw, fast = (build_optimizer(model, one)[0] for one in settings)
    slow = build_optimizer(model, settings[1])[0]

    def whole() -> None:
        with mock.patch.object(muon, "_LONG", math.inf):
            slow.step()

    jobs = {"gradients": gradients, "adamw": adamw.step, "muon": fast.step, "whole": whole}
    found = interleaved(jobs, rounds)
    base = found["gradients"]
    shares = [f"{1e3 * s:.1f} ({s / base:.0%})" for s in list(found.values())[1:]]
    return [name, f"{1e3 * base:.1f}", *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(2)
    sizes = {"quickstart": 4096, "shakespeare-char": 65}
    rows = [measure(name, vocab, args.rounds) for name, vocab in sizes.items()]
    header = ["recipe", "gradients, ms", "AdamW", "Muon", "Muon, X throughout"]
    note = (
        "\n\nMedians, the jobs one after the other. In brackets: beside the forward and backward. "
        "The last column iterates on the matrix itself everywhere, as before decision 026."
    )
    command = "cd backend && python -m benchmarks.optimizer_step"
    write_result("optimizer_step", command, table(header, rows) + note)


if __name__ == "__main__":
    main()

"""shakespeare-char 配方里每样东西一步要多少时间：各换一样，在同一个进程里轮流走。

cd backend && python -m benchmarks.recipe_parts

损失由 `gpt2 sweep` 量（docs/decisions/013-recipe-parts.md）；它与机器忙不忙无关，时间则要这样量。
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from app.cli.shared.runfile import load_config
from app.models.transformer import GPT2Model
from app.training.config import TrainConfig
from app.training.machine.runtime import choose_runtime
from app.training.optim.build import build_optimizer
from app.training.step import accumulate

from .common import interleaved, table, write_result

RECIPE = Path(__file__).parents[2] / "recipes" / "shakespeare-char.yaml"
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "the recipe": {},
    "optim.name=adamw": {"optim": {"name": "adamw"}},
    "model.position=learned": {"model": {"position": "learned"}},
    "model.qk_norm=false": {"model": {"qk_norm": False}},
    "model.activation=gelu_tanh": {"model": {"activation": "gelu_tanh"}},
    "precision=bfloat16": {"": {"precision": "bfloat16"}},
}


def stepper(changes: dict[str, dict[str, Any]]) -> Callable[[], None]:
    data = load_config(str(RECIPE)).config.to_dict()
    data["model"]["vocab_size"] = 66
    for section, values in changes.items():
        (data[section] if section else data).update(values)
    config = TrainConfig.from_dict(data)
    runtime = choose_runtime(config)
    model = GPT2Model(config.model).train()
    optimizer, _ = build_optimizer(model, config.optim)
    shape = (config.batch_size, config.model.context_size)
    ids = np.random.default_rng(0).integers(0, 66, shape)
    parameters = list(model.parameters())

    def step() -> None:
        accumulate(model, ids, ids, config.batch_size, runtime)
        nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    torch.set_num_threads(2)
    times = interleaved({name: stepper(changes) for name, changes in SWITCHES.items()}, 60)
    base = times["the recipe"]
    rows: list[list[object]] = [
        [name, f"{seconds * 1e3:.1f}", f"{seconds / base:.2f}x"] for name, seconds in times.items()
    ]
    note = "\n\nOne step of the recipe with one switch changed, the ways taking turns, 60 rounds."
    command = "cd backend && python -m benchmarks.recipe_parts"
    write_result("recipe_parts", command, table(["what", "ms a step", "ratio"], rows) + note)


if __name__ == "__main__":
    main()

"""shakespeare-char 配方里每样东西一步要多少时间：各换一样，在同一个进程里轮流走。

cd backend && python -m benchmarks.recipe_parts

损失由 `gpt2 sweep` 量（docs/decisions/013-recipe-parts.md）；它与机器忙不忙无关，时间则要这样量。
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.cli.shared.runfile import load_config
from app.training.config import TrainConfig

from .common import interleaved, table, write_result
from .training_step import stepper

RECIPE = Path(__file__).parents[2] / "recipes" / "shakespeare-char.yaml"
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "the recipe": {},
    "optim.name=adamw": {"optim": {"name": "adamw"}},
    "model.position=learned": {"model": {"position": "learned"}},
    "model.qk_norm=false": {"model": {"qk_norm": False}},
    "model.activation=gelu_tanh": {"model": {"activation": "gelu_tanh"}},
    "precision=bfloat16": {"": {"precision": "bfloat16"}},
}


def changed(changes: dict[str, dict[str, Any]]) -> TrainConfig:
    data = load_config(str(RECIPE)).config.to_dict()
    data["model"]["vocab_size"] = 66
    for section, values in changes.items():
        (data[section] if section else data).update(values)
    return TrainConfig.from_dict(data)


def main() -> None:
    torch.set_num_threads(2)
    times = interleaved({name: stepper(changed(changes)) for name, changes in SWITCHES.items()}, 60)
    base = times["the recipe"]
    rows: list[list[object]] = [
        [name, f"{seconds * 1e3:.1f}", f"{seconds / base:.2f}x"] for name, seconds in times.items()
    ]
    note = "\n\nOne step of the recipe with one switch changed, the ways taking turns, 60 rounds."
    command = "cd backend && python -m benchmarks.recipe_parts"
    write_result("recipe_parts", command, table(["what", "ms a step", "ratio"], rows) + note)


if __name__ == "__main__":
    main()

"""训练试验共用：一个小的真数据集，和一份几秒就跑完的配置。"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.models.transformer import GPT2Config
from app.training import run as run_module
from app.training.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
from app.training.run import Result

Make = Callable[..., TrainConfig]


def write_dataset(folder: Path, seed: int = 0) -> Path:
    words = ["the ", "cat ", "sat ", "on ", "a ", "mat.\n", "and ", "then ", "ran "]
    source = random.Random(seed)
    text = folder.with_suffix(".txt")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(source.choice(words) for _ in range(3000)))
    prepare(Sources((text,)), folder, TokenizerSpec("chars"), say=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture
def make(dataset: Path, tmp_path: Path) -> Make:
    """造配置的函数；默认有 dropout、两个微批、预热与裁剪。"""

    def build(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": GPT2Config(
                vocab_size=32, context_size=8, n_layer=2, n_head=2, n_embed=16, dropout=0.1
            ),
            "data": DataConfig(folder=str(dataset)),
            "optim": OptimConfig(lr=1e-2, grad_clip=0.5),
            "schedule": ScheduleConfig(warmup_steps=4),
            "out": str(tmp_path / "run"),
            "steps": 6,
            "batch_size": 4,
            "micro_batch": 2,
            "precision": "float32",
            "eval_every": 0,
            "eval_batches": 1,
            "sample_tokens": 0,
            "sample_every": 0,
            "save_every": 0,
            "device": "cpu",
        }
        return TrainConfig(**(values | changes))

    return build


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """画图占一秒；除了画图自己的试验都不画。"""
    if "plot" not in request.node.name:
        monkeypatch.setattr(run_module, "plot_losses", lambda run: None)


def train(config: TrainConfig, told: list[str] | None = None) -> Result:
    lines = [] if told is None else told
    return run_module.train(config, lambda plan: None, lines.append)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rows(run: Path | str, kind: str = "train") -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]

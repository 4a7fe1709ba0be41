"""分片等于一个进程：逐位（AdamW、Muon，W = 2、4），HSDP，梯度的精度；与认得出错的样子。"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from app.distributed.comm import Ranks
from app.distributed.shard import shard_model
from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.optim.build import build_optimizer

from .models import BASE, EXPERTS, KEEL, step_shards, train_alone
from .ranks import run_ranks

ADAMW, MUON = OptimConfig(lr=1e-2), OptimConfig(name="muon", lr=1e-2)
recompute = partial(checkpoint_blocks, layers=range(2))

# 名字 -> (配置, 优化器, 微批数, 在这之前做什么)。宽 24 的每行不是 16 的倍数，词表 97 是奇数；
# 12 个微批是四组，每组三个先依次相加。
CASES: dict[str, tuple[GPT2Config, OptimConfig, int, Callable[[GPT2Model], object]]] = {
    "adamw, groups of three": (BASE, ADAMW, 12, lambda model: None),
    "muon": (BASE, MUON, 4, lambda model: None),
    "keel, dropout, recompute": (KEEL, ADAMW, 4, recompute),
    "keel, muon": (KEEL, MUON, 4, lambda model: None),
    "experts, muon": (EXPERTS, MUON, 4, lambda model: None),
    "untied": (BASE.replace(tie_weights=False, norm="post"), ADAMW, 4, lambda model: None),
}


def train_shards(name: str, replicas: int = 1, steps: int = 2) -> tuple[dict[str, Tensor], list[float]]:
    config, optim, leaves, prepare = CASES[name]
    world = Ranks.world()
    mesh = init_device_mesh(
        "cpu", (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard")
    )
    copies, ranks = (Ranks.of(mesh.get_group(axis)) for axis in ("replicate", "shard"))
    torch.manual_seed(3)
    model = GPT2Model(config).train()
    prepare(model)
    shard_model(model, mesh["shard"], exact=True)
    optimizer, _ = build_optimizer(model, optim)
    norms = [
        step_shards(model, optimizer, optim, step, ranks, copies, leaves) for step in range(steps)
    ]
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}, norms


def many(names: list[str], replicas: int = 1) -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    return {name: train_shards(name, replicas) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    return {
        name: train_alone(config, optim, leaves=leaves, prepare=prepare)
        for name, (config, optim, leaves, prepare) in CASES.items()
    }


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_the_bits_are_those_of_one_process(size: int, replicas: int, alone: dict) -> None:
    for found in run_ranks(size, many, list(CASES), replicas):
        for name, (weights, norms) in found.items():
            want, want_norms = alone[name]
            assert norms == want_norms, name
            for key, value in want.items():
                assert torch.equal(weights[key], value), (name, key)

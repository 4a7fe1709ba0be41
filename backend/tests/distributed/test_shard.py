"""分片等于一个进程：逐位（AdamW、Muon，W = 2、4），HSDP，梯度的精度；与认得出错的样子。"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from app.distributed.comm import Ranks
from app.distributed.sharding import shard
from app.distributed.sharding.shard import shard_model
from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.optim import adamw, muon
from app.training.optim.adamw import by_decay
from app.training.optim.build import Named, build_optimizer

from . import models
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


def train_shards(
    name: str, replicas: int = 1, steps: int = 2
) -> tuple[dict[str, Tensor], list[float]]:
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


def plain_adamw(named: Named, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    groups = by_decay(named, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


# 名字 -> (哪个例子, 改哪里, 改成什么)：每一处做错，位都会不同。
MUTANTS: dict[str, tuple[str, object, str, object]] = {
    "the backend's own order of sums": (
        "untied", shard.TreeScatter, "__call__", lambda self, **kw: reduce_scatter(**kw),
    ),
    "ranks that are not neighbours first": (
        "untied", shard.TreeScatter, "__call__", lambda self, **kw: far_first(**kw),
    ),
    "each micro-batch of a group scattered": (
        "adamw, groups of three", models, "gathers_now", lambda model, now: None,
    ),
    "fused AdamW as it is": ("adamw, groups of three", adamw, "_sharded", plain_adamw),
    "Muon on the rows of a rank": (
        "muon", muon.MuonAdamW, "_owners", lambda self, matrices: OwnRows(),
    ),
}  # fmt: skip


def reduce_scatter(output_tensor: Tensor, input_tensor: Tensor, group: Any, **_: Any) -> None:
    """依次相加，从最后一个 rank 起。"""
    ranks = Ranks.of(group)
    parts = ranks.exchange(input_tensor.view(ranks.size, -1))
    total = parts[-1]
    for part in parts[:-1]:
        total = total + part
    output_tensor.copy_(total)


def far_first(output_tensor: Tensor, input_tensor: Tensor, group: Any, **_: Any) -> None:
    """(0 + 2) + (1 + 3)。"""
    parts = Ranks.of(group).exchange(input_tensor.view(4, -1))
    output_tensor.copy_((parts[0] + parts[2]) + (parts[1] + parts[3]))


class OwnRows:
    """每个 rank 只正交化自己的几行，其余当作零。"""

    def gather(self, parts: list[Tensor]) -> dict[int, Tensor]:
        size, rank = Ranks.world().size, Ranks.world().rank
        self.rows = [part.shape[0] for part in parts]
        return {
            i: torch.cat([part if r == rank else torch.zeros_like(part) for r in range(size)])
            for i, part in enumerate(parts)
        }

    def scatter(self, wholes: dict[int, Tensor], like: list[Tensor]) -> list[Tensor]:
        rank = Ranks.world().rank
        return [wholes[i].split(n)[rank] for i, n in enumerate(self.rows)]


def mutants() -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, (case, where, what, instead) in MUTANTS.items():
        kept = getattr(where, what)
        setattr(where, what, instead)
        try:
            found[name] = train_shards(case)[0]
        finally:
            setattr(where, what, kept)
    return found


def test_each_mistake_changes_the_bits(alone: dict) -> None:
    for name, weights in run_ranks(4, mutants)[0].items():
        want = alone[MUTANTS[name][0]][0]
        assert any(not torch.equal(weights[key], value) for key, value in want.items()), name


def test_muon_moves_the_weights(alone: dict) -> None:
    """DTensor 的 split 给出副本：照搬单进程的写法，只有衰减还在动。"""
    torch.manual_seed(3)
    start = dict(GPT2Model(BASE).named_parameters())
    moved, steps = alone["muon"][0], 2
    for key, value in start.items():
        if key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            decayed = value * (1 - MUON.lr * MUON.weight_decay) ** steps
            assert (moved[key] - decayed).abs().mean() > 0.1 * MUON.lr, key


def half_sharded() -> str:
    mesh = init_device_mesh("cpu", (Ranks.world().size,))
    model = GPT2Model(BASE)
    fully_shard(model.h["0"], mesh=mesh)
    optimizer, _ = build_optimizer(model, MUON)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_model_sharded_in_part_is_refused() -> None:
    assert (
        "4 of Muon's 8 matrices are sharded and the others are not" in run_ranks(2, half_sharded)[0]
    )


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

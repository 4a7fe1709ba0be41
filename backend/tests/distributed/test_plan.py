"""规划的数：假的进程组与真的 2、4 个 rank 相同，通信到字节，内存也是；一千个 rank 也说得出。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from app.distributed.config import ParallelConfig
from app.planning.ranks import fake_world, plan_ranks, walk
from app.planning.tracked import Step
from app.training.config import OptimConfig, TrainConfig

from .models import BASE
from .ranks import run_ranks

SMALL = TrainConfig(
    model=BASE.replace(n_embed=32, n_layer=3),
    batch_size=8,
    micro_batch=1,
    parallel=ParallelConfig(shard=2),
)
# 名字 -> (配置, 微批一组几个)。
CASES = {
    "adamw": (SMALL, 1),
    "muon, recompute": (
        SMALL.replace(optim=OptimConfig(name="muon"), activation_checkpointing=1, micro_batch=2), 1,
    ),
    "groups of three": (SMALL.replace(batch_size=12), 3),
    "all_reduce": (SMALL.replace(parallel=replace(SMALL.parallel, exact=False)), 1),
}  # fmt: skip


def real(names: list[str], replicas: int) -> dict[str, Step]:
    shape = (replicas, torch.distributed.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return walked(names, mesh)


def walked(names: list[str], mesh: DeviceMesh) -> dict[str, Step]:
    return {name: walk(CASES[name][0], 3, mesh, CASES[name][1], 2) for name in names}


def fake(shape: tuple[int, int], job: Callable[..., Any], *given: Any) -> Any:
    """在子进程里：假的网格留在 DTensor 的缓存里，之后 fork 出的真的 rank 会撞见它。"""
    return run_ranks(1, without_ranks, shape, job, given, limit=300)[0]


def without_ranks(shape: tuple[int, int] | None, job: Callable[..., Any], given: Any) -> Any:
    torch.distributed.destroy_process_group()
    try:
        if shape is None:
            return job(*given)
        with fake_world(*shape) as mesh, FakeTensorMode():
            return job(*given, mesh)
    finally:
        # run_ranks 最后还要等一次大家。
        torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())


def compare(names: list[str], size: int, replicas: int) -> None:
    planned = fake((replicas, size // replicas), walked, names)
    for rank, found in enumerate(run_ranks(size, real, names, replicas, limit=300)):
        for name, step in found.items():
            want = planned[name]
            # 规划的是 rank 0：词表是奇数，后面的 rank 少一行，换给 Muon 的主人的也就差几行。
            assert step.calls.count == want.calls.count, (name, rank)
            if rank == 0:
                assert step.calls == want.calls and step.round == want.round, name
            else:
                for kind, size in step.calls.nbytes.items():
                    assert abs(size / want.calls.nbytes[kind] - 1) < 0.02, (name, rank, kind)
            assert step.calls.nbytes["all_gather"] > 0
            if name == "all_reduce":
                # gloo 自己的 reduce-scatter 何时放掉输入不在追踪里，峰值落在别的时刻。
                continue
            same = step.peak == want.peak if rank == 0 else step.peak["Total"] <= want.peak["Total"]
            assert same, (name, rank, step.peak, want.peak)


def test_fake_ranks_equal_real_ones() -> None:
    compare(["muon, recompute"], 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_fake_ranks_equal_real_ones_in_every_case(size: int, replicas: int) -> None:
    compare(list(CASES), size, replicas)


def walk_seven(config: TrainConfig, mesh: DeviceMesh) -> Step:
    return walk(config, 7, mesh, 1, 4)


@pytest.mark.slow
def test_layers_and_rounds_left_out_are_extrapolated_to_the_byte() -> None:
    """六层、四轮全走的，等于走三、四层与两轮推出的。"""
    config = SMALL.replace(model=SMALL.model.replace(n_layer=7), batch_size=8)
    found = fake(None, plan_ranks, config, 2)
    assert found.layers == 4 and found.rounds == 4
    whole = fake((1, 2), walk_seven, config)
    assert found.calls == whole.calls
    assert found.peak["Total"] + found.held == whole.peak["Total"]


def test_a_thousand_ranks_are_planned_here() -> None:
    """微批没有写明：与训练选的相同，整批一次放不进一个 rank。"""
    config = SMALL.replace(
        model=SMALL.model.replace(n_layer=1),
        batch_size=2048,
        micro_batch=None,
        parallel=ParallelConfig(shard=128),
    )
    found = fake(None, plan_ranks, config, 1024)
    assert (found.replicate, found.shard, found.micro_batch, found.rounds) == (8, 128, 2, 1)
    assert found.calls.count["send"] == 3  # log2(8) 次蝶形
    assert found.seconds(1.0) == found.wire / 1e9


@pytest.mark.parametrize(
    ("changes", "world", "said"),
    [
        ({"batch_size": 6}, 4, "batch_size=6 is no multiple of 4 ranks x 1"),
        ({"batch_size": 6, "micro_batch": None}, 4, "batch_size=6 cannot .* evenly over 4 ranks"),
        ({"batch_size": 12}, 3, "ranks=3 but parallel.replicate=1 x parallel.shard=2"),
        ({"parallel": ParallelConfig(tensor=2)}, 2, "parallel.tensor=2 is not planned without"),
        ({"parallel": ParallelConfig(shard=6), "batch_size": 12}, 6, "ranks=6 with .*use 4"),
        ({"model": BASE.replace(moe_num_experts=2)}, 2, "model.moe_num_experts=2"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], world: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_ranks(SMALL.replace(**changes), world)

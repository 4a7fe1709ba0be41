"""两条轴一起：各自的函数照样用，次序是流水线、张量、专家、上下文、数据。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from app.distributed.comm import Ranks
from app.distributed.ways.context import split_context
from app.distributed.ways.experts import spread_experts
from app.distributed.ways.pipeline import Pipeline
from app.distributed.ways.tensor import split_heads
from app.distributed.ways.way import Way, sum_gradients
from app.models.transformer import GPT2Model

from .exact import (
    Batch,
    Case,
    Off,
    assert_exact,
    compare,
    make_batch,
    make_case,
    one_step,
    small_model,
    valid,
)
from .ranks import run_ranks

ROWS, MICRO = 4, 2


class Rows(Way):
    """数据的轴，只为测试：各 rank 读几行，梯度求和。"""

    splits_batch = True

    def batch(self, x: Any) -> Any:
        return x.chunk(self.ranks.size)[self.ranks.rank]

    def finish_gradients(self) -> None:
        sum_gradients(self.model.parameters(), self.ranks)


class Shards(Rows):
    """FSDP2 的轴，只为测试：块，再是根；反向里已求和。"""

    def __init__(self, model: GPT2Model, ranks: Ranks, roots: list[nn.Module]) -> None:
        super().__init__(model, ranks)
        assert ranks.group is not None
        mesh = DeviceMesh.from_group(ranks.group, "cpu", mesh_dim_names=("shard",))
        for module in (*model.h.values(), *roots):
            sharded = fully_shard(module, mesh=mesh)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)

    def finish_gradients(self) -> None:
        pass


Build = Callable[[GPT2Model, Ranks], Way]
AXES: dict[str, Build] = {
    "pipeline": lambda model, ranks: Pipeline(model, ranks, "1f1b"),
    "tensor": lambda model, ranks: split_heads(model, ranks),
    "sequence": lambda model, ranks: split_heads(model, ranks, sequence=True),
    "expert": spread_experts,
    "context": split_context,
    "data": Rows,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_kv_head": 2, "activation": "swiglu", "attention_pattern": ("local(6)", "causal")},
    "moe": {"moe_num_experts": 4},
}


def _axes() -> tuple[Ranks, Ranks]:
    """2 x 2：外面的轴是 {0, 2}、{1, 3}，里面的是 {0, 1}、{2, 3}。"""
    groups = [dist.new_group(members) for members in ([0, 2], [1, 3], [0, 1], [2, 3])]
    me = dist.get_rank()
    return Ranks.of(groups[me % 2]), Ranks.of(groups[2 + me // 2])


def _run(cases: list[tuple[str, str, Case]]) -> dict[str, Off]:
    found, (outer, inner) = {}, _axes()
    for first, second, case in cases:
        ways = [AXES[first](case.model, outer)]
        if second == "shard":
            way = ways[0]
            roots = way.build_parts() if isinstance(way, Pipeline) else [case.model]
            ways.append(Shards(case.model, inner, [*roots]))
        else:
            ways.append(AXES[second](case.model, inner))
        total, mine = valid(case.batch.y), case.batch
        for way in ways:
            mine = Batch(*(None if part is None else way.batch(part) for part in mine))
        pipe = ways[0]
        if isinstance(pipe, Pipeline):
            parts = mine.y.chunk(MICRO)
            pipe.connect(MICRO)
            share = torch.tensor([valid(y) / total for y in parts], dtype=torch.float64)
            loss = float(pipe.step(mine.x, mine.y, share, mine.segment).loss)
        else:
            loss = one_step(case.model, mine, total, 1)
        for way in ways:
            way.finish_gradients()
        found[case.name] = compare(case, ways, loss)
    return found


def _prepare(pairs: list[tuple[str, str]]) -> list[tuple[str, str, Case]]:
    cases = []
    for first, second in pairs:
        shape = "moe" if "expert" in (first, second) else "plain"
        # 均衡损失按微批，所以一个进程也走一行一行的微批。
        case = make_case(
            f"{first} x {second}", small_model(**SHAPES[shape]), make_batch(shape == "plain"), 1
        )
        cases.append((first, second, case))
    return cases


EVERYDAY = [("tensor", "data"), ("sequence", "context"), ("pipeline", "data"), ("expert", "data")]


def test_two_axes_equal_one_process() -> None:
    for found in run_ranks(4, _run, _prepare(EVERYDAY)):
        assert_exact(found)


@pytest.mark.slow
def test_every_pair_of_axes() -> None:
    pairs = [
        ("pipeline", "tensor"), ("pipeline", "sequence"), ("pipeline", "context"),
        ("pipeline", "expert"), ("tensor", "context"), ("sequence", "data"), ("context", "data"),
        ("tensor", "shard"), ("sequence", "shard"), ("context", "shard"), ("pipeline", "shard"),
    ]  # fmt: skip
    for found in run_ranks(4, _run, _prepare(pairs)):
        assert_exact(found)

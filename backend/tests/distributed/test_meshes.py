"""两条轴一起：各自的函数照样用，次序是流水线、张量、专家、上下文、数据。"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from app.distributed.comm import Ranks
from app.distributed.config import ParallelConfig
from app.distributed.ways.split import Split
from app.distributed.ways.way import Way, sum_gradients
from app.models.transformer import GPT2Model
from app.training.machine.recompute import checkpoint_blocks

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
    summed,
    valid,
)
from .ranks import run_ranks


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


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"n_kv_head": 2, "activation": "swiglu", "attention_pattern": ("local(6)", "causal")},
    "moe": {"moe_num_experts": 4},
}


def _axes() -> tuple[Ranks, Ranks]:
    """2 x 2：外面的轴是 {0, 2}、{1, 3}，里面的是 {0, 1}、{2, 3}。"""
    groups = [dist.new_group(members) for members in ([0, 2], [1, 3], [0, 1], [2, 3])]
    me = dist.get_rank()
    return Ranks.of(groups[me % 2]), Ranks.of(groups[2 + me // 2])


def _run(cases: list[tuple[str, str, Case]], recomputed: Collection[int] = ()) -> dict[str, Off]:
    found, (outer, inner) = {}, _axes()
    for first, second, case in cases:
        sequence = "sequence" in (first, second)
        axes = {"tensor" if n == "sequence" else n: r for n, r in ((first, outer), (second, inner))}
        data, shard = axes.pop("data", None), axes.pop("shard", None)
        split = Split(case.model, axes, ParallelConfig(tensor=2, sequence=sequence))
        checkpoint_blocks(case.model, recomputed)
        ways, mine = [*split.ways], case.batch
        if data is not None:
            ways.append(Rows(case.model, data))
        if shard is not None:
            ways.append(Shards(case.model, shard, split.roots))
        extra = ways[len(split.ways) :]
        for way in extra:
            mine = Batch(*(None if x is None else way.batch(x) for x in mine))
        flow = split.gradients(mine.x, mine.y, 1, valid(case.batch.y), mine.places)
        loss = float(flow.loss)
        for way in extra:
            way.finish_gradients()
            loss = summed(way, loss)
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


@pytest.mark.slow
def test_recomputed_blocks_talk_again() -> None:
    pairs = [
        ("pipeline", "tensor"), ("sequence", "context"), ("expert", "data"), ("context", "shard"),
    ]  # fmt: skip
    for found in run_ranks(4, _run, _prepare(pairs), range(2)):
        assert_exact(found)


def _five_steps(pair: tuple[str, str], clip: float) -> tuple[dict[str, Tensor], list[float]]:
    """裁剪过的五步之后的完整权重，与各步的损失。"""
    outer, inner = _axes()
    model, batch = small_model(**SHAPES["plain"]), make_batch()
    config = ParallelConfig(tensor=2, sequence="sequence" in pair)
    names = ["tensor" if name == "sequence" else name for name in pair]
    split = Split(model, dict(zip(names, (outer, inner), strict=True)), config)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        flow = split.gradients(batch.x, batch.y, 1, valid(batch.y))
        losses.append(float(flow.loss))
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, split.norm())
        optimizer.step()
    mine = dict(model.named_parameters())
    whole = {
        name: split.whole(name, mine[name].detach() if name in mine else None)
        for name, _ in small_model(**SHAPES["plain"]).named_parameters()
    }
    assert all(x is not None for x in whole.values())
    return whole, losses  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("pipeline", "tensor"), ("sequence", "context")])
def test_five_clipped_steps_give_the_weights_of_one_process(pair: tuple[str, str]) -> None:
    clip, model, batch = 0.5, small_model(**SHAPES["plain"]), make_batch()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(one_step(model, batch, valid(batch.y), 1))
        assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
    for weights, found in run_ranks(4, _five_steps, pair, clip):
        assert found == pytest.approx(losses, abs=1e-11)
        for name, p in model.named_parameters():
            assert (weights[name] - p).abs().max() < 1e-10, name

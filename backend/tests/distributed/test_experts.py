"""专家并行等于一个进程走同样的微批；负载与 selection_bias 恰好相等。"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from app.distributed.comm import Ranks
from app.distributed.ways import experts
from app.distributed.ways.experts import spread_experts
from app.models.transformer import GPT2Model
from app.models.transformer.settings.moe_config import MoEConfig
from app.training.watch.expert_load import update_selection_bias

from .exact import (
    ROWS,
    Batch,
    Case,
    Off,
    assert_exact,
    compare,
    gradients,
    make_batch,
    make_case,
    one_step,
    small_model,
    summed,
    valid,
)  # fmt: skip
from .ranks import run_ranks

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu, one dense": {"activation": "swiglu", "moe": MoEConfig(first_dense=1)},
    "sigmoid, shared": {
        "moe": MoEConfig(router="sigmoid", bias_update_rate=0.01, shared_experts=1, aux_loss_coef=0)
    },
    "capacity": {"moe": MoEConfig(capacity_factor=0.7)},
    "switch, no bias": {
        "moe": MoEConfig(router="switch"), "moe_top_k": 1, "bias": False, "norm": "keel",
    },
}  # fmt: skip


def _prepare(names: list[str], size: int) -> list[Case]:
    return [
        make_case(
            name, small_model(**{"moe_num_experts": 4} | SHAPES[name]), make_batch(), ROWS // size
        )
        for name in names
    ]


def _run(cases: list[Case]) -> dict[str, Off]:
    found = {}
    for case in cases:
        spread = spread_experts(case.model, Ranks.world())
        mine = Batch(spread.batch(case.batch.x), spread.batch(case.batch.y))
        loss = one_step(case.model, mine, valid(case.batch.y))
        spread.finish_gradients()
        found[case.name] = compare(case, [spread], summed(spread, loss))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_spread_experts_equal_one_process(size: int) -> None:
    for found in run_ranks(size, _run, _prepare(list(SHAPES), size)):
        assert_exact(found)


def _one_favourite() -> dict[str, Off]:
    """所有的词元都去同一个专家：有的 rank 一行也收不到。"""
    model = small_model(moe_num_experts=4, moe_top_k=1, moe=MoEConfig(router="switch"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router.weight"):
                p.zero_()
    return _run([make_case("favourite", model, make_batch(), ROWS // Ranks.world().size)])


def test_a_rank_may_get_no_rows() -> None:
    for found in run_ranks(2, _one_favourite):
        assert_exact(found)


def _loads(model: GPT2Model, batch: Batch, micro: int) -> Tensor:
    parts = range(0, len(batch.x), micro)
    return sum(model(batch.x[i : i + micro])["expert_load"] for i in parts)  # type: ignore[return-value]


def _bias() -> tuple[Tensor, Tensor]:
    model = small_model(**{"moe_num_experts": 4} | SHAPES["sigmoid, shared"])
    spread, batch = spread_experts(model, Ranks.world()), make_batch()
    mine = Batch(spread.batch(batch.x), spread.batch(batch.y))
    load = spread.ranks.sum(_loads(model, mine, 1))
    update_selection_bias(model, load)
    return load, dict(model.named_buffers())["h.0.mlp.router.selection_bias"]


def test_loads_and_selection_bias_are_equal() -> None:
    model = small_model(**{"moe_num_experts": 4} | SHAPES["sigmoid, shared"])
    load = _loads(model, make_batch(), 1)
    update_selection_bias(model, load)
    bias = dict(model.named_buffers())["h.0.mlp.router.selection_bias"]
    assert bias.abs().min() > 0
    for found in run_ranks(2, _bias):
        assert torch.equal(found[0], load) and torch.equal(found[1], bias)


def _divided() -> dict[str, Off]:
    def wrong(way: experts.SpreadExperts) -> None:
        for name, grad in gradients(way.model).items():
            if way.rules[name] is not None:
                grad.div_(way.ranks.size)
        original(way)

    original = experts.SpreadExperts.finish_gradients
    with mock.patch.object(experts.SpreadExperts, "finish_gradients", wrong):
        return _run(_prepare(["plain"], 2))


def test_expert_gradients_divided_by_the_ranks_are_seen() -> None:
    off = run_ranks(2, _divided)[0]["plain"]
    assert ".experts." in off.where and off.gradient == pytest.approx(0.5)


def test_what_cannot_be_spread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.expert=2 but the model has no experts"):
        spread_experts(small_model(), Ranks(0, 2))
    with pytest.raises(ValueError, match=r"moe_num_experts=5 cannot be split .*parallel.expert=2"):
        spread_experts(small_model(moe_num_experts=5), Ranks(0, 2))
    with pytest.raises(ValueError, match="moe.dispatch='reference'"):
        model = small_model(moe_num_experts=4, moe=MoEConfig(dispatch="reference"))
        spread_experts(model, Ranks(0, 2))

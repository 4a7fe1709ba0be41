"""流水线的各种次序等于一个进程走同样的微批；共享的词表的两份逐位相等。"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from app.distributed.comm import Ranks
from app.distributed.ways.pipeline import ORDERS, Pipeline, check_micro_batches, check_pipeline
from app.distributed.ways.stages import layers_of, stages_of

from .exact import (
    Case,
    Off,
    assert_exact,
    compare,
    make_batch,
    make_case,
    small_model,
    valid,
)  # fmt: skip
from .ranks import run_ranks

MICRO = 4
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_weights": False, "norm": "post"},
    "keel": {"norm": "keel", "position": "rope", "activation": "swiglu"},
    "moe": {"moe_num_experts": 4},
}


def _prepare(wanted: list[tuple[str, str]], packed: bool = False) -> list[tuple[Any, Case]]:
    batch = make_batch(packed, rows=MICRO)
    return [
        (schedule, make_case(
            f"{schedule} {name}", small_model(n_layer=4, **SHAPES[name]), batch, micro=1
        ))
        for schedule, name in wanted
    ]  # fmt: skip


def _shares(y: Tensor) -> Tensor:
    share = torch.tensor([valid(part) / valid(y) for part in y.split(1)], dtype=torch.float64)
    return torch.stack([share, share], 1)


def _run(cases: list[tuple[Any, Case]]) -> dict[str, Off]:
    found = {}
    for schedule, case in cases:
        pipe = Pipeline(case.model, Ranks.world(), schedule)
        pipe.connect(MICRO)
        x, y = case.batch.x, case.batch.y
        flow = pipe.step(x, y, _shares(y), case.batch.places)
        pipe.finish_gradients()
        found[case.name] = compare(case, [pipe], float(flow.loss))
    return found


def test_every_schedule_equals_one_process() -> None:
    wanted = [(schedule, "tied") for schedule in ORDERS]
    for found in run_ranks(2, _run, _prepare([*wanted, ("1f1b", "moe"), ("interleaved", "moe")])):
        assert_exact(found)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "packed"), [(2, True), (2, False), (4, False)])
def test_every_schedule_with_every_model(size: int, packed: bool) -> None:
    wanted = [
        (schedule, name)
        for schedule, name in itertools.product(ORDERS, SHAPES)
        if not (name == "moe" and ORDERS[schedule].splits) and size * ORDERS[schedule].each <= 4
    ]
    for found in run_ranks(size, _run, _prepare(wanted, packed), limit=240):
        assert_exact(found)


def _five_steps(schedule: Any) -> tuple[Tensor, float]:
    """共享的词表（没有就是零）与最后的损失。"""
    model = small_model(n_layer=4)
    pipe = Pipeline(model, Ranks.world(), schedule)
    pipe.connect(MICRO)
    x, y, *_ = make_batch(rows=MICRO)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        flow = pipe.step(x, y, _shares(y))
        pipe.finish_gradients()
        optimizer.step()
    again = pipe.evaluate(x, y, _shares(y))
    assert float(again.loss) < float(flow.loss)
    return model.embed.wte.weight.detach(), float(again.loss)


def test_tied_copies_stay_equal_to_the_bit() -> None:
    model = small_model(n_layer=4)
    x, y, *_ = make_batch(rows=MICRO)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(x, targets=y)["loss"].backward()
        optimizer.step()
    (one, loss), (two, same) = run_ranks(2, _five_steps, "1f1b")
    assert torch.equal(one, two) and loss == same
    assert loss == pytest.approx(float(model(x, targets=y)["loss"].detach()), abs=1e-10)
    assert (one - model.embed.wte.weight).abs().max() < 1e-10


def _without_the_sum() -> dict[str, Off]:
    with mock.patch.object(Pipeline, "finish_gradients", lambda self: None):
        return _run(_prepare([("1f1b", "tied")]))


def test_a_tied_copy_not_summed_is_seen() -> None:
    off = run_ranks(2, _without_the_sum)[0]["1f1b tied"]
    assert off.where == "embed.wte.weight" and off.gradient > 1e-2


def _loads() -> tuple[Tensor, float]:
    model = small_model(n_layer=4, moe_num_experts=4)
    pipe = Pipeline(model, Ranks.world(), "1f1b")
    pipe.connect(MICRO)
    x, y, *_ = make_batch(rows=MICRO)
    flow = pipe.step(x, y, _shares(y))
    assert flow.load is not None and flow.aux_loss is not None
    return flow.load, float(flow.aux_loss)


def test_loads_of_all_stages_are_the_models() -> None:
    model = small_model(n_layer=4, moe_num_experts=4)
    x, y, *_ = make_batch(rows=MICRO)
    parts = [model(row) for row in x.split(1)]
    load = sum(out["expert_load"] for out in parts)
    each = torch.stack([out["aux_loss"].detach() for out in parts])
    aux = float((each * _shares(y)[:, 0]).sum())
    for found in run_ranks(2, _loads):
        assert torch.equal(found[0], load) and found[1] == pytest.approx(aux, rel=1e-12)


def test_layers_and_stages() -> None:
    assert [layers_of(s, 4, 6) for s in range(4)] == [
        range(2), range(2, 4), range(4, 5), range(5, 6),
    ]  # fmt: skip
    assert [stages_of(r, 2, 4, folded=False) for r in range(2)] == [[0, 2], [1, 3]]
    assert [stages_of(r, 2, 4, folded=True) for r in range(2)] == [[0, 3], [1, 2]]


def test_what_cannot_flow_is_refused() -> None:
    config = small_model(n_layer=2).config
    with pytest.raises(ValueError, match=r"n_layer=2 with parallel.pipeline=2 and .*'zbv'"):
        check_pipeline(config, 2, "zbv")
    with pytest.raises(ValueError, match=r"moe_num_experts=4 with .*='zero_bubble'"):
        check_pipeline(config.replace(n_layer=4, moe_num_experts=4), 2, "zero_bubble")
    with pytest.raises(ValueError, match=r"3 micro-batches with .*'dualpipev' .*at least 4"):
        check_micro_batches("dualpipev", 3, 2)
    with pytest.raises(ValueError, match=r"7 micro-batches .*: use a multiple of 2, at least 4"):
        check_micro_batches("interleaved", 7, 2)
    check_micro_batches("gpipe", 1, 4)

"""float32 与 bfloat16 的 autocast：只差舍入。"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from app.distributed.comm import Ranks
from app.distributed.config import ParallelConfig
from app.distributed.ways.split import Split

from .exact import Off, compare, make_batch, make_case, small_model, valid
from .ranks import run_ranks

AXES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(
        ("context", {"context": 2, "context_way": way}, {"attention_pattern": "local(6)"})
        for way in ("halo", "ulysses", "gather", "ring")
    ),
    ("tensor", {"tensor": 2}, {"activation": "swiglu"}),
    ("tensor", {"tensor": 2, "sequence": True}, {}),
    ("expert", {"expert": 2}, {"moe_num_experts": 4}),
    ("pipeline", {"pipeline": 2}, {}),
    ("pipeline", {"pipeline": 2, "schedule": "zbv"}, {"n_layer": 4}),
]


def _cast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


def _run(dtype: torch.dtype) -> dict[str, Off]:
    found = {}
    for axis, parallel, changes in AXES:
        model, batch = small_model(**changes).float(), make_batch()
        with _cast(dtype):
            case = make_case(f"{parallel}", model, batch, 1)
        split = Split(
            model, {axis: Ranks.world()}, ParallelConfig(**parallel), partial(_cast, dtype)
        )
        flow = split.gradients(batch.x, batch.y, 1, valid(batch.y))
        found[case.name] = compare(case, split.ways, float(flow.loss))
    return found


@pytest.mark.parametrize(
    ("dtype", "loss", "gradient"),
    [(torch.float32, 2e-6, 3e-6), pytest.param(torch.bfloat16, 2e-2, 0.1, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_narrow_numbers_differ_by_rounding(
    dtype: torch.dtype, loss: float, gradient: float
) -> None:
    for found in run_ranks(2, _run, dtype):
        for case, off in found.items():
            assert off.loss <= loss and off.gradient <= gradient, f"{case}: {off}"

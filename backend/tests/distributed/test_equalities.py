"""`gpt2 verify` 在几个 rank 上：都通过时说都通过，算错时点名是哪一项、哪个 rank、差多少。"""

from __future__ import annotations

import pytest
import torch

from app.distributed.config import ParallelConfig
from app.distributed.mesh import build_mesh, degrees
from app.distributed.sharding.shard import TreeScatter
from app.equalities.checks import CHECKS
from app.equalities.verify import verify_config, verify_ranks
from app.models.transformer import GPT2Config

from .models import BASE
from .ranks import run_ranks

SHARDS = ParallelConfig(shard=2)


def verify(
    parallel: ParallelConfig, break_it: bool, model: GPT2Config = BASE
) -> tuple[bool, list[str]]:
    if break_it:
        add = TreeScatter.__call__

        def off_by_a_bit(self: TreeScatter, **given: object) -> None:
            add(self, **given)
            given["output_tensor"].mul_(1 + 2**-20)

        TreeScatter.__call__ = off_by_a_bit
    size, lines = torch.distributed.get_world_size(), []
    mesh = build_mesh(parallel, "cpu")
    config = verify_config(model, parallel, _readers(parallel, size))
    return verify_ranks(config, mesh, torch.device("cpu"), lines.append), lines


def _readers(parallel: ParallelConfig, size: int) -> int:
    found = degrees(parallel, size)
    return found["replicate"] * found["shard"] * found["expert"]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, SHARDS),
        pytest.param(4, SHARDS, marks=pytest.mark.slow),
        pytest.param(2, ParallelConfig(), marks=pytest.mark.slow),
        pytest.param(2, ParallelConfig(shard=2, exact=False), marks=pytest.mark.slow),
    ],
)
def test_a_right_machine_passes(size: int, parallel: ParallelConfig) -> None:
    for rank, (passed, lines) in enumerate(run_ranks(size, verify, parallel, False)):
        assert passed, lines
        assert len(lines) == (len(CHECKS) + 2 if rank == 0 else 0)
        assert rank or lines[-1] == "5 checks, all passed"


EVEN = BASE.replace(vocab_size=96)
EXPERTS = BASE.replace(moe_num_experts=4)


@pytest.mark.parametrize(
    ("size", "parallel", "model"),
    [
        (4, ParallelConfig(tensor=2, replicate=2), EVEN),
        *(
            pytest.param(size, parallel, model, marks=pytest.mark.slow)
            for size, parallel, model in (
                (4, ParallelConfig(pipeline=2, shard=2), BASE),
                (4, ParallelConfig(context=2, tensor=2), EVEN),
                (2, ParallelConfig(expert=2), EXPERTS),
                (2, ParallelConfig(pipeline=2), EXPERTS),
            )
        ),
    ],
)
def test_a_split_model_passes(size: int, parallel: ParallelConfig, model: GPT2Config) -> None:
    passed, lines = run_ranks(size, verify, parallel, False, model)[0]
    assert passed, lines
    assert "dropout 0.0" in lines[0]
    assert lines[-1] == f"{4 if parallel.tensor > 1 else 5} checks, all passed"


def test_a_wrong_sum_is_named() -> None:
    (passed, lines), (other, _) = run_ranks(2, verify, SHARDS, True)
    assert not passed and not other
    failed = [line for line in lines if line.startswith("❌")]
    assert [line.split(":")[0] for line in failed] == [
        "❌ gradients equal one process",
        "❌ AdamW, 3 steps, equals one process",
        "❌ Muon, 3 steps, equals one process",
    ]
    assert "relative error 9.5e-07" in failed[0]
    assert lines[-1] == "5 checks, 3 failed"

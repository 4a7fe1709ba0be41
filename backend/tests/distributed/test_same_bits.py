"""P2：1、2、4 个 rank 训练出的权重、优化器、记录逐位相同；P18：哪一处做错都会被看出来。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.models.transformer import GPT2Config
from app.models.transformer.settings.moe_config import MoEConfig
from app.training.config import OptimConfig

from ..training.conftest import Make, rows
from .team import fingerprint, train_on

MOE = {"moe_num_experts": 4, "moe_top_k": 2, "moe": MoEConfig(router="sigmoid")}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"dropout": 0.0},
    "dropout": {"dropout": 0.1},
    "bf16": {"dropout": 0.1, "precision": "bfloat16"},
    "recompute": {"dropout": 0.1, "activation_checkpointing": 1},
    "experts": {"dropout": 0.1, **MOE},
    "everything": {
        "dropout": 0.1, "norm": "keel", "norm_type": "rmsnorm", "position": "rope",
        "activation": "swiglu", "n_kv_head": 1, "bias": False,
    },
}  # fmt: skip


def config_of(make: Make, out: Path, optim: str, kind: str, **changes: Any) -> Any:
    values = dict(KINDS[kind])
    training = {k: values.pop(k) for k in ("precision", "activation_checkpointing") if k in values}
    shape = {"vocab_size": 32, "context_size": 8, "n_layer": 2, "n_head": 2, "n_embed": 16}
    return make(
        **(
            {
                "model": GPT2Config(**(shape | values)),
                "optim": OptimConfig(name=optim, lr=1e-2, grad_clip=0.5),
                "out": str(out),
                "batch_size": 8,
                "micro_batch": 1,
                "eval_every": 3,
                "eval_batches": 2,
            }
            | training
            | changes
        )
    )


# 平日只跑这两个，其余的是 slow。
EVERYDAY = {("adamw", "dropout"), ("muon", "experts")}
CASES = [
    pytest.param(optim, kind, marks=() if (optim, kind) in EVERYDAY else pytest.mark.slow)
    for optim in ("adamw", "muon")
    for kind in KINDS
]


@pytest.mark.parametrize(("optim", "kind"), CASES)
def test_the_same_bits_for_1_2_and_4_ranks(
    make: Make,
    tmp_path: Path,
    optim: str,
    kind: str,
) -> None:
    found, seen = {}, {}
    for size in (1, 2, 4):
        config = config_of(make, tmp_path / str(size), optim, kind)
        found[size] = fingerprint(train_on(size, config)[0])
        seen[size] = [
            [
                (r["step"], r["loss"], r.get("grad_norm"), r.get("aux_loss"))
                for r in rows(config.out, k)
            ]
            for k in ("train", "eval")
        ]
    assert found[1] == found[2] == found[4]
    assert seen[1] == seen[2] == seen[4] and len(seen[1][0]) == 6

"""整个训练循环在分片上：损失、范数、检查点的字节与副本、与一个进程的相同；换个分法接着训也是。"""

from __future__ import annotations

from pathlib import Path

import pytest

from app.distributed.config import ParallelConfig

from ..training.conftest import Make, dataset, make, rows  # noqa: F401
from . import models  # noqa: F401  fork 之前导入慢的那些
from .team import fingerprint, train_on
from .test_same_bits import config_of

CASES = [
    pytest.param("muon", "everything"),
    pytest.param("adamw", "recompute", marks=pytest.mark.slow),
    pytest.param("adamw", "experts", marks=pytest.mark.slow),
    pytest.param("adamw", "bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("optim", "kind"), CASES)
def test_shards_train_to_the_bits_of_one_process(
    make: Make,  # noqa: F811
    tmp_path: Path,
    optim: str,
    kind: str,
) -> None:
    found, seen = {}, {}
    for size, shard in ((1, 1), (2, 2), (4, 2)):
        out = tmp_path / f"{size} {shard}"
        config = config_of(
            make, out, optim, kind, parallel=ParallelConfig(shard=shard), sample_tokens=0
        )
        found[size] = fingerprint(train_on(size, config)[0])
        seen[size] = [
            [(r["step"], r["loss"], r.get("grad_norm"), r.get("aux_loss")) for r in rows(out, k)]
            for k in ("train", "eval")
        ]
    assert found[1] == found[2] == found[4]
    assert seen[1] == seen[2] == seen[4] and len(seen[1][0]) == 6


def test_a_run_goes_on_with_other_shards(make: Make, tmp_path: Path) -> None:  # noqa: F811
    """4 片训 3 步，再 2 份副本训到底，等于一个进程不停地训。"""

    def some(out: str, shard: int, **changes: object) -> object:
        parallel = ParallelConfig(shard=shard)
        return config_of(
            make, tmp_path / out, "adamw", "dropout", parallel=parallel, sample_tokens=0, **changes
        )

    whole, _ = train_on(1, some("whole", 1))
    first, _ = train_on(4, some("first", 4, save_every=3, keep_last=9))
    half = first.parent / "step-00000003"
    rest, said = train_on(2, some("rest", 1, resume=str(half)))
    assert fingerprint(rest) == fingerprint(first) == fingerprint(whole)

"""副本与分片上的别的目标：1、2、4 个 rank 同样的位；切开的轴训练打包的数据，或在开始之前拒绝。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.distributed.check import check
from app.distributed.config import ParallelConfig
from app.training.config import DataConfig, OptimConfig
from app.training.ranks import job_of

from ..training.conftest import Make, rows, weights
from ..training.tuned import MODES, base, chats, modes, pairs, small, teacher
from .team import fingerprint, train_on

__all__ = ["base", "chats", "modes", "pairs", "teacher"]

Modes = dict[str, dict[str, Any]]


def config_of(make: Make, out: Path, change: dict[str, Any], **more: Any) -> Any:
    values = {"out": str(out), "batch_size": 8, "micro_batch": 2, "eval_every": 3, **change, **more}
    return make(**values)


def same_bits(make: Make, tmp_path: Path, change: dict[str, Any], sizes: tuple[int, ...]) -> None:
    found, seen = set(), []
    for size in sizes:
        config = config_of(make, tmp_path / str(size), change)
        found.add(fingerprint(train_on(size, config)[0]))
        kept = [rows(config.out, kind) for kind in ("train", "eval")]
        for row in (*kept[0], *kept[1]):
            row.pop("seconds", None)
        seen.append(kept)
    assert len(found) == 1 and all(one == seen[0] for one in seen)


def test_dpo_gives_the_same_bits_on_two_ranks(make: Make, tmp_path: Path, modes: Modes) -> None:
    same_bits(make, tmp_path, modes["dpo"], (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_objective_gives_the_same_bits(
    make: Make, tmp_path: Path, modes: Modes, mode: str
) -> None:
    same_bits(make, tmp_path, modes[mode], (1, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_objective_gives_the_same_bits_in_shards(
    make: Make, tmp_path: Path, modes: Modes, mode: str
) -> None:
    if "lora" in mode:
        pytest.skip("frozen weights are not divided: refused (tests/adapters)")
    parallel = ParallelConfig(shard=2)
    config = config_of(make, tmp_path / "cut", modes[mode], parallel=parallel)
    whole = config_of(make, tmp_path / "whole", modes[mode])
    assert fingerprint(train_on(2, config)[0]) == fingerprint(train_on(1, whole)[0])


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_packed_rows_on_split_models(make: Make, tmp_path: Path, chats: Path, axis: str) -> None:
    """与一个进程差舍入；键的偏置的梯度只有舍入，eps 大些，Adam 才不把它放大成整步。"""
    change = {
        "data": DataConfig(folder=str(chats), pack=True), "model": small(),
        "optim": OptimConfig(lr=1e-2, eps=1e-4, grad_clip=0.5),
    }  # fmt: skip
    found = []
    for size in (1, 2):
        parallel = ParallelConfig(**({axis: 2} if size == 2 else {}))
        config = config_of(make, tmp_path / str(size), change, parallel=parallel)
        found.append(weights(train_on(size, config)[0]))
    for name, wanted in found[0].items():
        assert float((found[1][name] - wanted).abs().max()) < 1e-5, name


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline", "expert"])
@pytest.mark.parametrize("mode", ["distill", "dpo"])
def test_split_models_refuse_other_objectives(
    make: Make, modes: Modes, axis: str, mode: str
) -> None:
    parallel = ParallelConfig(**{axis: 2})
    model = small(moe_num_experts=2 if axis == "expert" else 0)
    config = make(**{**modes[mode], "model": model, "parallel": parallel, "batch_size": 8})
    with pytest.raises(ValueError, match=rf"objective.kind={mode} with parallel.{axis}=2"):
        check(job_of(config), 2)

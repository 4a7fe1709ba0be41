"""P1：几份副本的梯度等于一个进程的整批；P15：一个 rank 上的 NaN；P18：做错的都看得出来。

B 行 8、T 词元 8；有的行没有目标，有的 rank 一个目标也没有。
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.data.batch import UNSCORED as IGNORE
from app.data.batch import Batch
from app.distributed import replicate
from app.distributed.comm import Ranks
from app.distributed.mesh import build_mesh
from app.distributed.replicate import TreeSum, leaf_group, my_rows
from app.models.transformer import GPT2Config, GPT2Model
from app.training import engine as engine_module
from app.training import step as step_module
from app.training.config import TrainConfig
from app.training.engine import AllReduced, Replicated
from app.training.machine.runtime import Runtime
from app.training.step import Sums, accumulate, gradient_norm
from app.training.whole_model import WholeModel

from ..training.conftest import Make, rows, same_weights
from .ranks import run_ranks
from .team import failing_here, train_here, train_on

CPU = Runtime(torch.device("cpu"), "", torch.float32, "")
B, T = 8, 8
SHAPES: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm": "pre"},
    "keel": {
        "norm": "keel", "norm_type": "rmsnorm", "position": "rope", "activation": "swiglu",
        "n_kv_head": 1, "tie_weights": False,
    },
    "experts": {"moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip


def model_of(shape: dict[str, Any]) -> GPT2Model:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "context_size": T, "n_layer": 2, "n_head": 2, "n_embed": 16}
    return GPT2Model(GPT2Config(**(sizes | {"dropout": 0.0} | shape))).double()


def batch() -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(0)
    inputs, targets = source.integers(0, 32, (2, B, T))
    for row, kept in enumerate([8, 3, 0, 5, 0, 0, 1, 8]):
        targets[row, kept:] = IGNORE
    return inputs, targets


def gradients(model: GPT2Model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _mine(shape: dict[str, Any], micro: int, exact: bool) -> tuple[dict[str, Tensor], list[Any]]:
    model = model_of(shape)
    config = TrainConfig(model=model.config, batch_size=B, micro_batch=micro)
    kind = Replicated if exact else AllReduced
    mesh = build_mesh(config.parallel, "cpu")
    engine = kind(model, config, CPU, mesh, WholeModel.of(model))
    inputs, targets = batch()
    sums = engine.gradients(Batch(inputs, targets).rows(engine.rows), 0)
    found = [sums.loss, engine.norm(), sums.aux_loss, sums.load, sums.dropped]
    return gradients(model), found


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-9))
        for name in wanted
    )


@pytest.mark.parametrize(
    ("size", "micro", "exact"),
    [
        (2, 2, True),
        (4, 1, False),
        *(
            pytest.param(size, micro, exact, marks=pytest.mark.slow)
            for size, micro, exact in [
                (2, 1, True), (4, 1, True), (4, 2, True),
                (2, 1, False), (2, 2, False), (4, 2, False),
            ]
        ),
    ],
)  # fmt: skip
def test_replicas_equal_the_whole_batch(size: int, micro: int, exact: bool) -> None:
    """看到 8e-16；容差 1e-14。"""
    for name, shape in SHAPES.items():
        alone = model_of(shape)
        sums = accumulate(alone, Batch(*batch()), micro, CPU)
        wanted = gradients(alone)
        for mine, (loss, norm, aux, load, dropped) in run_ranks(size, _mine, shape, micro, exact):
            assert worst(mine, wanted) < 1e-14, name
            assert float(loss - sums.loss) == pytest.approx(0.0, abs=1e-14)
            assert float(aux - sums.aux_loss) == pytest.approx(0.0, abs=1e-14)
            assert float(norm) == pytest.approx(float(gradient_norm(alone.parameters())), rel=1e-13)
            if sums.load is not None:
                assert torch.equal(load, sums.load) and torch.equal(dropped, sums.dropped)


def test_rows_and_leaves() -> None:
    """几组叶子恰是完全二叉树，任何整除的 2 的幂都不拆开一组。"""
    assert [leaf_group(n) for n in (1, 2, 3, 4, 6, 7, 8, 12, 96)] == [1, 1, 3, 1, 3, 7, 1, 3, 3]
    assert [my_rows(8, Ranks(r, 4)) for r in (0, 3)] == [slice(0, 2), slice(6, 8)]


def test_the_counter_holds_few_and_adds_in_the_shape_of_a_tree() -> None:
    leaves = [torch.randn(999) * 10.0**i for i in range(8)]
    tree, most = TreeSum(), 0
    for leaf in leaves:
        tree.add([leaf.clone()])
        most = max(most, len(tree._held))
    while len(leaves) > 1:
        leaves = [a + b for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
    assert torch.equal(tree.total()[0], leaves[0]) and most <= 4


# ---- P18：每一处做错 ----


def _mean_of_means() -> None:
    def accumulate(model: Any, part: Any, weight: int, runtime: Any, objective: Any) -> Sums:
        return step_module.backward(model, part, max(1, objective.weight(part)) * B, runtime)

    engine_module.backward = accumulate  # type: ignore[assignment]


def _share_of_local_tokens() -> None:
    real = Ranks.sum
    Ranks.sum = lambda self, x: x if x.ndim == 0 else real(self, x)  # type: ignore


def _wrong(spoil: Callable[[], None]) -> dict[str, Tensor]:
    spoil()
    return _mine({}, 1, True)[0]


@pytest.mark.parametrize("spoil", [_mean_of_means, _share_of_local_tokens])
def test_a_wrong_share_is_far_off(spoil: Callable[[], None]) -> None:
    alone = model_of({})
    accumulate(alone, Batch(*batch()), 1, CPU)
    assert worst(run_ranks(2, _wrong, spoil)[0], gradients(alone)) > 1e-2


def _seed_without_row() -> None:
    real = replicate.seed_rows
    engine_module.seed_rows = lambda seed, step, row: real(seed, step, 0)  # type: ignore


def _seed_of_the_rank() -> None:
    def seed(seed: int, step: int, row: int) -> None:
        if row == my_rows(B, Ranks.world()).start:
            replicate.seed_rows(seed, step, Ranks.world().rank)

    engine_module.seed_rows = seed  # type: ignore[assignment]


def _all_reduce_for_the_tree() -> None:
    engine_module.tree_sum = replicate.plain_sum  # type: ignore[assignment]
    engine_module.leaf_group = lambda leaves: leaves // Ranks.world().size  # type: ignore


MUTANTS = {
    "seed of the rank": (_seed_of_the_rank, 0.1),
    "all_reduce for the tree": (_all_reduce_for_the_tree, 0.0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_bits_that_depend_on_the_ranks_are_seen(
    make: Make,
    tmp_path: Path,
    mutant: str,
) -> None:
    spoil, dropout = MUTANTS[mutant]
    model = GPT2Config(
        vocab_size=32, context_size=8, n_layer=2, n_head=2, n_embed=16, dropout=dropout
    )
    found = {}
    for size in (1, 2):
        config = make(out=str(tmp_path / str(size)), batch_size=B, micro_batch=1, model=model)
        found[size] = train_on(size, config, spoil)[0]
    assert not same_weights(found[1], found[2])


def test_masks_differ_from_row_to_row(make: Make, tmp_path: Path) -> None:
    """种子里没有行号：各微批的掩码相同，W 之间照样逐位相等，所以要另外看。"""
    config = make(batch_size=B, micro_batch=1)
    good = train_on(1, config)[0]
    other = config.replace(out=str(tmp_path / "other"))
    assert not same_weights(good, train_on(1, other, _seed_without_row)[0])


# ---- P15：一个 rank 上的 NaN ----


def _poison(where: str) -> Callable[[], None]:
    """rank 1 的第 3 步。"""

    def prepare() -> None:
        real, calls = engine_module.backward, [0]

        def backward(model: Any, *args: Any) -> Sums:
            calls[0] += 1
            # 每步两个微批：第 3 步的第一个。
            now = calls[0] == 5 and Ranks.world().rank == 1
            matrix = model.h["1"].mlp.c_fc.weight
            if now and where == "weight":
                matrix.data[0, 0] = float("nan")
            sums = real(model, *args)
            if now and where == "loss":
                return sums._replace(loss=sums.loss * float("nan"))
            if now and where == "gradient":
                matrix.grad[0, 0] = float("nan")
            return sums

        engine_module.backward = backward  # type: ignore[assignment]

    return prepare


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_on_one_rank_changes_no_weight_anywhere(make: Make, where: str) -> None:
    """C1：那一步哪个 rank 都不更新，只数一次，别的步照常。"""
    config = make(micro_batch=1, save_every=1, keep_last=9)
    found = run_ranks(2, train_here, config, _poison(where))
    assert [result["skipped"] for result, _ in found] == [1, 1]
    run = Path(config.out)
    assert same_weights(run / "step-00000002", run / "step-00000003")
    assert not same_weights(run / "step-00000003", run / "step-00000004")
    assert [row["step"] for row in rows(run, "skipped")] == [3]


def test_a_broken_weight_of_one_rank_ends_all(make: Make) -> None:
    """rank 0 自己的权重是好的，也不存：说出是哪个 rank 的哪个权重。"""
    config = make(micro_batch=1, save_every=2, keep_last=9, steps=20)
    found = run_ranks(2, failing_here, config, _poison("weight"))
    assert {kind for kind, _ in found} == {"TrainingDiverged"} and found[0][1] == found[1][1]
    assert "h.1.mlp.c_fc.weight of rank 1" in found[0][1]
    assert [path.name for path in Path(config.out).glob("step-*")] == ["step-00000002"]

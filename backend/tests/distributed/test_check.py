"""P17：做不了的并行在建进程组之前就拒绝；每句话有两个值与改法。"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from app.distributed.check import Job, check, check_alone
from app.distributed.comm import Ranks
from app.distributed.config import ParallelConfig
from app.distributed.mesh import Mesh, degrees
from app.distributed.ways.context import choose_way
from app.models.transformer import GPT2Config
from app.models.transformer.settings.moe_config import MoEConfig
from app.training import run as run_module
from app.training.config import ObjectiveConfig, TrainConfig
from app.training.ranks import with_leaves

from ..training.conftest import Make
from .ranks import run_ranks
from .team import failing_here

SHAPE = {
    "vocab_size": 96, "context_size": 32, "n_layer": 2, "n_head": 4, "n_embed": 32, "dropout": 0.0,
}  # fmt: skip
MOE = {"moe_num_experts": 4, "moe_top_k": 2}

# (rank 数, parallel, 模型, 其余, 报错里的话)
REFUSED: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    (6, {"shard": 4}, {}, {}, "6 ranks cannot be divided into shard 4 = 4: start a multiple of 4"),
    (4, {"replicate": 2}, {}, {}, "4 ranks were started but replicate 2 = 2: start 2 ranks"),
    (3, {}, {}, {"batch_size": 9}, "parallel.exact=true .* 3 ranks .* use 2 ranks"),
    (2, {}, {}, {"batch_size": 7}, r"batch_size=7 is not a multiple of 2 \(2 ranks\): use batch"),
    (2, {}, {}, {"micro_batch": 3}, r"batch_size=8 .* of 6 \(2 ranks x micro_batch=3\)"),
    (4, {"exact": False, "shard": 2}, {}, {"micro_batch": 3}, r"4 ranks x micro_batch=3"),
    (3, {"tensor": 3}, {}, {}, r"parallel.tensor=3 does not divide n_head 4: use 6"),
    (4, {"tensor": 4}, {"n_kv_head": 2}, {}, r"parallel.tensor=4 .* kv heads .* 2: use 4"),
    (8, {"tensor": 8}, {"n_head": 8, "n_embed": 8, "activation": "swiglu", "vocab_size": 97}, {},
     "parallel.tensor=8 does not divide vocab_size 97: use 104"),
    (2, {"tensor": 2}, {"vocab_size": 50257}, {}, "vocab_size 50257: use 50258"),
    (2, {"tensor": 2}, {"dropout": 0.1}, {}, "dropout=0.1 with parallel.tensor=2"),
    (2, {"context": 2}, {"dropout": 0.1}, {}, "dropout=0.1 with parallel.context=2"),
    (2, {"tensor": 2}, MOE, {}, "moe_num_experts=4 with parallel.tensor=2"),
    (2, {"tensor": 2, "sequence": True}, {"context_size": 33}, {}, "context_size=33 over parallel"),
    (2, {"pipeline": 2, "schedule": "zero_bubble"}, {"n_layer": 4, **MOE}, {},
     "schedule=zero_bubble splits.*moe_num_experts=4: use schedule=1f1b"),
    (2, {"pipeline": 2, "schedule": "zero_bubble"}, {"n_layer": 4}, {"compile": "on"},
     "schedule=zero_bubble .* compile=on"),
    (4, {"pipeline": 4}, {}, {}, "4 stages but model.n_layer=2"),
    (2, {"pipeline": 2, "schedule": "interleaved"}, {}, {}, "4 stages but model.n_layer=2"),
    (2, {"context": 2}, {**MOE, "moe": MoEConfig(capacity_factor=4.0)}, {},
     "capacity_factor=4.0 with parallel.context=2"),
    (3, {"context": 3}, {}, {}, "parallel.context=3 does not divide model.context_size=32: use 33"),
    (2, {"context": 2, "context_way": "halo"}, {"attention_pattern": "local(20)"}, {},
     "parallel.context=2: .* needs 19 earlier keys and a rank holds 16"),
    (2, {"context": 2, "context_way": "halo"}, {"attention_pattern": "longformer(4, 1)"}, {},
     "halo with attention_pattern='longformer.*far keys"),
    (2, {"context": 2, "context_way": "halo"}, {}, {}, "halo with attention_pattern='causal'"),
    (2, {"context": 2, "context_way": "ulysses"}, {"n_kv_head": 1}, {}, "kv heads .* 1 is not"),
    (2, {"context_way": "ring"}, {}, {}, "context_way=ring has no effect with parallel.context=1"),
    (2, {"schedule": "gpipe"}, {}, {}, "schedule=gpipe has no effect with parallel.pipeline=1"),
    (2, {"expert": 2}, {}, {}, "parallel.expert=2 but model.moe_num_experts=0"),
    (3, {"expert": 3, "exact": False}, MOE, {"batch_size": 9}, "parallel.expert=3 does not divide"),
    (4, {"shard": 2, "expert": 2}, MOE, {}, "shard=2 .*is not a tested combination"),
    (4, {"tensor": 2, "expert": 2}, MOE, {}, "expert=2 with parallel.tensor=2 is not"),
    (8, {"replicate": 2, "shard": 2, "tensor": 2}, {}, {}, "3 axes .* only 2"),
    (2, {"tensor": 2}, {}, {"sample_tokens": 9}, "sample_tokens=9 with parallel.tensor=2"),
    (2, {"expert": 2}, MOE, {"sample_tokens": 9}, "sample_tokens=9 with parallel.expert=2"),
    (2, {"tensor": 2}, {}, {"optimizer": "muon"}, "optim.name=muon with parallel.tensor=2"),
    (2, {"pipeline": 2}, {}, {"micro_batch": 8}, "give 1 micro-batches, but parallel.pipeline=2"),
    (2, {"context": 2}, {}, {"sample_tokens": 9}, "sample_tokens=9 with parallel.context=2"),
    (2, {"pipeline": 2}, {}, {"sample_tokens": 9}, "sample_tokens=9 with parallel.pipeline=2"),
    (2, {}, {}, {"device": "cuda:1"}, "device=cuda:1 with 2 ranks"),
    (2, {}, {}, {"device": "mps"}, "device=mps with 2 ranks"),
]  # fmt: skip


def job(parallel: dict[str, Any], model: dict[str, Any], rest: dict[str, Any]) -> Job:
    shape = GPT2Config(**(SHAPE | model))
    return Job(parallel=ParallelConfig(**parallel), model=shape, **({"batch_size": 8} | rest))


@pytest.mark.parametrize("case", REFUSED, ids=[case[4][:40] for case in REFUSED])
def test_refusals_name_both_values_and_the_fix(case: Any) -> None:
    world, parallel, model, rest, said = case
    with pytest.raises(ValueError, match=said):
        check(job(parallel, model, rest), world)


@pytest.mark.parametrize("window", [16, 17, 18])
def test_the_check_of_halo_is_that_of_the_split(window: int) -> None:
    """一个 rank 16 个词元：local(17) 还要左邻的 16 个，正好；18 就不够。"""
    asked = job(
        {"context": 2, "context_way": "halo"}, {"attention_pattern": f"local({window})"}, {}
    )
    (pattern,) = set(asked.model.patterns)
    refused = {16: False, 17: False, 18: True}[window]
    for ask in (
        lambda: check(asked, 2),
        lambda: choose_way("halo", pattern, 16, 4, Ranks(0, 2)),
    ):
        with pytest.raises(ValueError, match="needs 17 ") if refused else nullcontext():
            ask()


def test_a_batch_that_the_chosen_micro_batch_cannot_divide_is_refused() -> None:
    """--ranks 2 --parallel.pipeline 2 --batch-size 7：微批没有写明，流水线却分不匀。"""
    pipeline = ParallelConfig(pipeline=2)
    with pytest.raises(ValueError, match=r"batch_size=7 .* 1 ranks .* 2 pipeline .*batch_size=8"):
        with_leaves(TrainConfig(parallel=pipeline, batch_size=7), 1)
    pairs = ObjectiveConfig(kind="dpo")
    model = TrainConfig().model.replace(dropout=0.0)
    config = TrainConfig(objective=pairs, init_from="x", batch_size=2, model=model)
    with pytest.raises(ValueError, match="batch_size=2 .* 2 ranks .*whole pairs.*batch_size=4"):
        with_leaves(config, 2)
    assert with_leaves(TrainConfig(parallel=pipeline, batch_size=6), 1).micro_batch == 3


def test_the_chosen_micro_batch_is_checked_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(
        batch_size=4, micro_batch=None, parallel=ParallelConfig(pipeline=2),
        model=make().model.replace(dropout=0.0),
    )  # fmt: skip
    monkeypatch.setattr(run_module, "with_leaves", lambda c, n: c.replace(micro_batch=4))
    with pytest.raises(ValueError, match="batch_size=4 and micro_batch=4 give 1 micro-batches"):
        run_module.train(config, lambda plan: None, mesh=Mesh(world=Ranks(0, 2, None)))


def test_what_is_offered_is_not_refused() -> None:
    allowed: list[tuple[int, dict[str, Any]]] = [
        (1, {}), (2, {}), (4, {}), (4, {"shard": 2}), (4, {"shard": 4}),
        (4, {"shard": 2, "tensor": 2}), (4, {"pipeline": 2, "shard": 2}),
        (4, {"shard": 2, "context": 2}), (4, {"tensor": 2}), (2, {"context": 2}),
        (2, {"pipeline": 2}), (2, {"tensor": 2, "sequence": True}),
    ]  # fmt: skip
    for world, parallel in allowed:
        check(job(parallel, {}, {}), world)
    check(job({"expert": 2}, MOE, {}), 2)
    check(job({"exact": False}, {}, {"batch_size": 9}), 3)


def test_degrees_fill_up_with_replicas() -> None:
    found = degrees(ParallelConfig(shard=2), 8)
    assert found["replicate"] == 4 and found["shard"] == 2


def test_settings_without_ranks_are_refused() -> None:
    check_alone(ParallelConfig(timeout_s=5, grace_s=5))
    with pytest.raises(ValueError, match="parallel.shard=2, parallel.exact=false but this is 1"):
        check_alone(ParallelConfig(shard=2, exact=False))


def _fails_with(config: TrainConfig, what: str) -> tuple[str, str]:
    """rank 1 上有一样不同。"""
    if Ranks.world().rank == 1:
        if what == "threads":
            torch.set_num_threads(2)
        elif what == "run file":
            config = config.replace(seed=9)
        elif what == "package":
            run_module.peer_facts = lambda *args: {"torch (version)": "1.0"}  # type: ignore
    elif what == "package":
        run_module.peer_facts = lambda *args: {"torch (version)": "2.0"}  # type: ignore
    return failing_here(config)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("threads", "rank 1 has threads=2 but rank 0 has 1"),
        ("run file", "rank 1 has seed=9 but rank 0 has 0"),
        ("package", r"rank 1 has torch \(version\)=1.0 but rank 0 has 2.0"),
    ],
)
def test_ranks_that_differ_are_named_and_nothing_is_written(
    make: Make,
    what: str,
    said: str,
) -> None:
    config = make(micro_batch=1)
    found = run_ranks(2, _fails_with, config, what)
    assert {kind for kind, _ in found} == {"ValueError"} and found[0][1] == found[1][1]
    assert re.search(said, found[0][1])
    assert not Path(config.out).exists()


def test_a_folder_in_use_is_refused_on_every_rank(make: Make) -> None:
    config = make(micro_batch=1)
    Path(config.out).mkdir()
    (Path(config.out) / "thesis.txt").write_text("mine")
    found = run_ranks(2, failing_here, config)
    assert [kind for kind, _ in found] == ["ValueError"] * 2
    assert all("already exists and is never overwritten" in text for _, text in found)
    assert [path.name for path in Path(config.out).iterdir()] == ["thesis.txt"]

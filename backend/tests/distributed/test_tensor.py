"""张量与序列并行等于一个进程；拼成的矩阵切错了看得出。"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
import torch

from app.distributed.comm import Ranks
from app.distributed.ways import way
from app.distributed.ways.layout import Cut, cut_of
from app.distributed.ways.tensor import split_heads

from .exact import (
    Case,
    Off,
    assert_exact,
    compare,
    make_batch,
    make_case,
    one_step,
    small_model,
    valid,
)  # fmt: skip
from .ranks import run_ranks

SHAPES: dict[str, dict[str, Any]] = {
    "pre": {},
    "post, untied": {"norm": "post", "tie_weights": False},
    "rms, no bias": {"norm_type": "rmsnorm", "bias": False},
    "keel": {
        "norm": "keel", "n_kv_head": 2, "activation": "swiglu", "position": "rope",
        "qk_norm": True,
    },
    "deepnorm": {"norm": "deepnorm", "activation": "swiglu"},
    "sparse": {"attention_pattern": ("local(6)", "fixed(8, 2)"), "attention_backend": "blocked"},
}  # fmt: skip


def _prepare(names: list[str]) -> list[Case]:
    return [
        make_case(f"{name} packed={packed}", small_model(**SHAPES[name]), make_batch(packed))
        for name, packed in itertools.product(names, (False, True))
    ]


def _run(cases: list[Case], sequence: bool) -> dict[str, Off]:
    found = {}
    for case in cases:
        split = split_heads(case.model, Ranks.world(), sequence)
        loss = one_step(case.model, case.batch, valid(case.batch.y))
        split.finish_gradients()
        found[case.name] = compare(case, [split], loss)
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_two_ranks_equal_one_process(sequence: bool) -> None:
    for found in run_ranks(2, _run, _prepare(["pre", "keel"]), sequence):
        assert_exact(found)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_every_shape(size: int, sequence: bool) -> None:
    names = [name for name in SHAPES if size == 2 or name != "keel"]
    for found in run_ranks(size, _run, _prepare(names), sequence):
        assert_exact(found)


def _cut_evenly(parts: int) -> dict[str, Off]:
    """错的切法：拼成 parts 份的矩阵整个等分，形状照样都对。"""

    def wrong(name: str, shape: Any, config: Any) -> Cut | None:
        rule = cut_of(name, shape, config)
        if rule is None or len(rule.parts) != parts:
            return rule
        return dataclasses.replace(rule, parts=(sum(rule.parts),))

    with mock.patch.object(way, "cut_of", wrong):
        shape = {"activation": "swiglu"} if parts == 2 else {}
        case = make_case("wrong", small_model(**shape), make_batch())
        return _run([case], False)


@pytest.mark.parametrize("parts", [2, 3], ids=["swiglu in halves", "qkv in thirds"])
def test_fused_matrices_cut_evenly_are_seen(parts: int) -> None:
    off = run_ranks(2, _cut_evenly, parts)[0]["wrong"]
    assert off.loss > 1e-6 and off.gradient > 1e-2


def _checkpoint() -> bool:
    model = small_model(n_kv_head=2, activation="swiglu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    split = split_heads(model, Ranks.world())
    pieces = {name: p.detach() for name, p in model.named_parameters()}
    assert sum(p.numel() for p in pieces.values()) < 0.6 * sum(p.numel() for p in before.values())
    return all(
        torch.equal(split.whole(name, pieces[name]), whole)
        and torch.equal(split.part(name, whole), pieces[name])
        for name, whole in before.items()
    )


def test_a_checkpoint_joins_the_pieces() -> None:
    assert run_ranks(2, _checkpoint) == [True, True]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_head": 1}, "n_head=1 cannot be split evenly over parallel.tensor=2"),
        ({"n_kv_head": 1}, "n_kv_head=1 cannot be split"),
        ({"vocab_size": 97}, "vocab_size=97 cannot be split"),
        ({"context_size": 31}, "context_size=31 cannot be split"),
        ({"dropout": 0.1}, "dropout=0.1 with parallel.tensor=2"),
        ({"moe_num_experts": 4}, "moe_num_experts=4 with parallel.tensor=2"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_heads(small_model(**changes), Ranks(0, 2), sequence=True)


def _logits() -> str:
    model = small_model()
    split_heads(model, Ranks.world())
    with pytest.raises(ValueError) as error:
        model(make_batch().x)
    return str(error.value)


def test_logits_are_refused() -> None:
    assert "logits are split over the vocabulary" in run_ranks(2, _logits)[0]

"""上下文并行等于一个进程：方式 x 图样 x 打包。"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from app.distributed.comm import Ranks
from app.distributed.config import ParallelConfig
from app.distributed.ways.context import Halo, choose_way, span, split_context
from app.distributed.ways.split import Split
from app.models.transformer.settings.moe_config import MoEConfig
from app.models.transformer.visibility.pattern_text import parse
from app.models.transformer.visibility.positions import Positions

from .exact import (
    ROWS,
    TOKENS,
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
)
from .ranks import run_ranks

PATTERNS = {
    "causal": None,
    "local": "local(6)",
    "dilated": "local(3, 2)",
    "sinks": "sinks(2, 5)",
    "fixed": "fixed(8, 2)",
    "strided": "local(4) | strided(4)",
    "mixed": ("local(5)", "causal"),
}
BOUNDED = ("local", "dilated")
Wanted = tuple[str, str, bool, dict[str, Any]]


def _cases(ways: tuple[str, ...], patterns: tuple[str, ...]) -> list[Wanted]:
    return [
        (way, name, packed, {})
        for way, name, packed in itertools.product(ways, patterns, (False, True))
        if way != "halo" or name in BOUNDED
    ]


def _prepare(wanted: list[Wanted]) -> list[tuple[str, Case]]:
    return [
        (way, make_case(
            f"{way} {name} packed={packed} {changes}",
            small_model(attention_pattern=PATTERNS[name], **changes),
            make_batch(packed),
        ))
        for way, name, packed, changes in wanted
    ]  # fmt: skip


def _run(cases: list[tuple[str, Case]]) -> dict[str, Off]:
    found = {}
    for way, case in cases:
        split = split_context(case.model, Ranks.world(), way)  # type: ignore[arg-type]
        mine = Batch(*(None if part is None else split.batch(part) for part in case.batch))
        loss = one_step(case.model, mine, valid(case.batch.y))
        split.finish_gradients()
        found[case.name] = compare(case, [split], summed(split, loss))
    return found


EVERYDAY = [
    *_cases(("halo",), BOUNDED),
    *_cases(("ulysses", "gather", "ring"), ("causal", "local", "sinks")),
    ("auto", "mixed", True, {"position": "rope", "n_kv_head": 2, "qk_norm": True}),
    ("halo", "local", False, {"attention_backend": "blocked", "norm": "post"}),
    ("ring", "strided", True, {"attention_backend": "blocked", "n_kv_head": 1}),
    ("ulysses", "strided", True, {"attention_backend": "blocked", "norm": "keel"}),
]


def test_two_ranks_equal_one_process() -> None:
    for found in run_ranks(2, _run, _prepare(EVERYDAY)):
        assert_exact(found)


def test_four_ranks_equal_one_process() -> None:
    cases = [
        (way, name, True, {})
        for way in ("ulysses", "gather", "ring")
        for name in ("local", "fixed")
    ] + [("halo", "local", packed, {}) for packed in (False, True)]
    for found in run_ranks(4, _run, _prepare(cases)):
        assert_exact(found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_way_with_every_pattern(size: int) -> None:
    cases = _cases(("halo", "ulysses", "gather", "ring"), tuple(PATTERNS))
    shapes: list[dict[str, Any]] = [
        {}, {"position": "rope", "n_kv_head": 1, "activation": "swiglu", "norm": "keel"},
    ]  # fmt: skip
    every = [
        (way, name, packed, shape)
        for (way, name, packed, _), shape in itertools.product(cases, shapes)
        if not (way == "ulysses" and shape)
    ]
    assert len(every) > 70
    for found in run_ranks(size, _run, _prepare(every), limit=240):
        assert_exact(found)


def _with_masks(pattern: str, ways: tuple[str, ...], **masks: Tensor) -> dict[str, Off]:
    found = {}
    for way in ways:
        model, batch = small_model(attention_pattern=pattern), make_batch()
        y = batch.y.masked_fill(masks.get("attention_mask", torch.ones(1)) == 0, -100)
        loss = model(batch.x, targets=y, **masks)["loss"]
        loss.backward()
        case = Case(way, model, Batch(batch.x, y), float(loss.detach()), gradients(model))
        model.zero_grad()
        split = split_context(model, Ranks.world(), way)  # type: ignore[arg-type]
        x, part = split.batch(batch.x), split.batch(y)
        mine = {name: split.batch(mask) for name, mask in masks.items()}
        loss = model(x, targets=part, **mine)["loss"] * (valid(part) / valid(y))
        loss.backward()
        split.finish_gradients()
        found[way] = compare(case, [split], summed(split, float(loss.detach())))
    return found


def _padded() -> dict[str, Off]:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[0, :11], mask[3, 20:] = 0, 0
    return _with_masks("local(6)", ("halo", "ulysses", "gather", "ring"), attention_mask=mask)


def _marked() -> dict[str, Off]:
    marks = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    marks[0, 3], marks[1, 20], marks[2, 7] = 1, 1, 1
    ways = ("ulysses", "gather", "ring")
    return _with_masks("longformer(4, 1)", ways, global_attention_mask=marks)


@pytest.mark.parametrize("job", [_padded, _marked])
def test_masks_are_cut_with_the_tokens(job: Callable[[], dict[str, Off]]) -> None:
    for found in run_ranks(2, job):
        assert_exact(found)


def _with_experts() -> dict[str, Off]:
    found = {}
    for way, router in itertools.product(("ulysses", "ring"), ("softmax_topk", "sigmoid")):
        moe = MoEConfig(router=router, shared_experts=1)  # type: ignore[arg-type]
        model, batch = small_model(moe_num_experts=4, moe=moe), make_batch(packed=True)
        case = make_case(f"{way} {router}", model, batch, micro=1)
        given = (batch.x, batch.segment, batch.mask)
        each = zip(*(x.split(1) for x in given if x is not None), strict=True)
        load = sum(
            model(row, segment_ids=part, attention_mask=mask)["expert_load"]
            for row, part, mask in each
        )
        config = ParallelConfig(context=2, context_way=way)  # type: ignore[arg-type]
        split = Split(model, {"context": Ranks.world()}, config)
        flow = split.gradients(batch.x, batch.y, 1, valid(batch.y), batch.places)
        assert flow.load is not None and torch.equal(flow.load, load)  # type: ignore[arg-type]
        found[case.name] = compare(case, split.ways, float(flow.loss))
    return found


def test_the_balance_loss_is_of_the_whole_row() -> None:
    for found in run_ranks(2, _with_experts):
        assert_exact(found)


def _halo_one_short() -> float:
    with mock.patch.object(Halo, "length", property(lambda self: self.pattern.reach - 2)):
        return max(off.gradient for off in _run(_prepare([("halo", "local", False, {})])).values())


def test_a_halo_one_short_is_seen() -> None:
    assert min(run_ranks(2, _halo_one_short)) > 1e-4


def test_auto_says_why() -> None:
    four = Ranks(0, 4)
    assert choose_way("auto", parse("local(6)"), 8, 4, four)[0] == "halo"
    way, why = choose_way("auto", parse("local(10)"), 8, 4, four)
    assert way == "ulysses" and "needs 9 earlier keys and a rank holds 8" in why
    way, why = choose_way("auto", parse("causal"), 8, 2, four)
    assert way == "gather" and "2 key heads do not divide over 4 ranks" in why
    for asked, pattern in (("halo", "causal"), ("halo", "sinks(2, 5)"), ("ulysses", "causal")):
        with pytest.raises(ValueError, match="use 'auto'"):
            choose_way(asked, parse(pattern), 8, 2, four)  # type: ignore[arg-type]


def test_what_cannot_be_exact_is_refused() -> None:
    two = Ranks(0, 2)
    with pytest.raises(ValueError, match=r"dropout=0.1 with parallel.context=2"):
        split_context(small_model(dropout=0.1), two)
    with pytest.raises(ValueError, match=r"context_size=31 cannot be split .* parallel.context=2"):
        split_context(small_model(context_size=31), two)
    with pytest.raises(ValueError, match=r"moe.capacity_factor=2.0 with parallel.context=2"):
        split_context(small_model(moe_num_experts=4, moe=MoEConfig(capacity_factor=2.0)), two)
    model = small_model()
    split_context(model, two)
    with pytest.raises(ValueError, match="features and caches need whole sequences"):
        model.features(make_batch().x)


def test_a_span_keeps_its_place() -> None:
    """start 是静态事实：与 pos 不符，选后端的人就被骗了。"""
    whole = Positions.plain(2, 10, torch.device("cpu"))
    mine = span(whole, 4, 7)
    assert mine.pos.tolist() == [[6, 7, 8]] and mine.start == 6 and mine.dense

"""批不变：同样的请求，文字与概率逐位相同，不论旁边有谁、借没借、猜没猜（I11）。"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from app.models.transformer import GPT2Model
from app.models.transformer.cache.row_cache import RowCache
from app.native.build import load_native
from app.serving.engine import Engine, Limits
from app.serving.flat_step import FlatStep, InvariantStep
from app.serving.request import Event, Order
from app.serving.schedule import Pace
from app.serving.served import serve_model
from tests.quantization.helpers import SCHEMES, quantized
from tests.serving.helpers import BYTES, CHEAP, Clock, byte_model, check, run, some_ask

pytestmark = pytest.mark.skipif(load_native().handle is None, reason=load_native().reason)
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "pre"},
    "modern": {
        "norm": "pre", "norm_type": "rmsnorm", "position": "rope", "qk_norm": True,
        "activation": "swiglu", "n_kv_head": 2, "bias": False,
    },
    "post": {"norm": "post", "activation": "relu2"},
}  # fmt: skip


def model_of(kind: str, scheme: str = "float32") -> GPT2Model:
    torch.manual_seed(1)
    model = byte_model(torch.float32, **KINDS[kind])
    return model if scheme == "float32" else quantized(model, SCHEMES[scheme])


def engine_of(
    model: GPT2Model, step: type[FlatStep], rows: int, pace: Pace, guess: bool = False
) -> Engine:
    from app.serving.drafting import NGramDrafter

    flat = step(model, RowCache(model.config, rows, dtype=torch.float32))
    drafter = NGramDrafter() if guess else None
    return Engine(flat, BYTES, Limits(pace=pace), drafter=drafter, costs=CHEAP, clock=Clock())


def said(events: list[Event]) -> list[Any]:
    """每个词元：号、它的对数概率、最可能的几个；浮点按位。"""
    return [(one.id, one.logprob, one.top) for event in events for one in event.tokens]


def crowd(seed: int, model: GPT2Model, step: type[FlatStep]) -> tuple[list[Any], list[Any]]:
    """(一群一起写的, 同样的请求各在一个新的、只有一行的引擎里写的)。"""
    rng = random.Random(seed)
    asks = [some_ask(rng, logprobs=2) for _ in range(rng.randint(4, 9))]
    arrival = [rng.randint(0, 12) for _ in asks]
    pace = Pace(chunk=rng.choice([3, 7, 64, 256]), max_stall=rng.choice([0.0, 9.0]))
    engine = engine_of(model, step, rng.randint(2, 6), pace, guess=bool(seed % 2))
    found: dict[int, list[Event]] = {}
    for turn in range(2000):
        for number, ask in enumerate(asks):
            if arrival[number] == turn:
                engine.submit(Order(number, (ask,)))
        for event in engine.step() if engine.busy else []:
            found.setdefault(event.order, []).append(event)
        check(engine)
        if turn > 12 and not engine.busy:
            break
    together = [said(found[number]) for number in range(len(asks))]
    alone = []
    for ask in asks:
        single = engine_of(model, step, 1, Pace(chunk=rng.choice([5, 256])))
        alone.append(said(run(single, [Order(0, (ask,))])[0, 0]))
    return together, alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_request_has_the_same_bits(kind: str, seed: int) -> None:
    together, alone = crowd(seed, model_of(kind), InvariantStep)
    assert together == alone


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4"])
def test_of_quantized_models_too(scheme: str) -> None:
    together, alone = crowd(3, model_of("gpt2", scheme), InvariantStep)
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 206))
def test_two_hundred_crowds(seed: int) -> None:
    together, alone = crowd(seed, model_of(list(KINDS)[seed % 3]), InvariantStep)
    assert together == alone


def test_the_usual_step_promises_less() -> None:
    """否则上面的测试什么也没有看见。"""
    pairs = [crowd(seed, model_of("modern"), FlatStep) for seed in range(4)]
    assert any(together != alone for together, alone in pairs)


def test_prompt_scores_have_the_same_bits() -> None:
    model, rng = model_of("gpt2"), random.Random(0)
    asks = [
        some_ask(rng, prompt=tuple(rng.randrange(257) for _ in range(40)), max_tokens=2,
                 score_prompt=True, logprobs=1)
        for _ in range(3)
    ]  # fmt: skip
    many = run(
        engine_of(model, InvariantStep, 3, Pace(chunk=50)),
        [Order(i, (ask,)) for i, ask in enumerate(asks)],
    )
    for i, ask in enumerate(asks):
        single = run(engine_of(model, InvariantStep, 1, Pace(chunk=7)), [Order(0, (ask,))])
        assert [event.prompt for event in many[i, 0]][0] == single[0, 0][0].prompt
        assert said(many[i, 0]) == said(single[0, 0])


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"moe_num_experts": 4}, {}, "have experts"),
        ({"attention_pattern": "local(5)"}, {}, r"attention_pattern='local\(5\)'"),
        ({}, {"kv_dtype": "int8"}, "keys as torch.int8"),
    ],
)
def test_what_cannot_be_promised_is_refused(
    changes: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    model = byte_model(torch.float32, norm="pre", **changes)
    with pytest.raises(ValueError, match=f"batch_invariant=True .*{reason}.*leave"):
        serve_model("m", model, BYTES, batch_invariant=True, **options)


def test_a_model_that_is_broken_or_was_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = byte_model(torch.float32, norm="pre")
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="logits are not finite"):
        serve_model("m", model, BYTES, batch_invariant=True)
    model = byte_model(torch.float32, norm="pre")
    real = model.head
    monkeypatch.setattr(type(model), "head", lambda self, x: 1.01 * real(x))
    with pytest.warns(UserWarning, match="differs"), pytest.raises(ValueError, match="differs"):
        serve_model("m", model, BYTES, batch_invariant=True)


def test_it_says_so() -> None:
    for asked in (False, True):
        served = serve_model("m", model_of("gpt2"), BYTES, batch_invariant=asked)
        assert served.facts()["batch_invariant"] is asked

"""引擎的承诺：一段文字只由它自己决定（I1、I4 到 I10）。"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from app.generation.config import SamplingConfig
from app.models.transformer import GPT2Model
from app.serving.engine import Engine, Limits
from app.serving.request import Ask, Event, Order
from app.serving.rows import Rows
from app.serving.schedule import Pace
from app.serving.served import serve_model
from tests.quantization.helpers import SCHEMES, float_model, quantized
from tests.serving.helpers import (
    BYTES,
    COSTS,
    alone,
    byte_model,
    check,
    ids,
    make_engine,
    run,
    some_ask,
    text,
)

PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {}),
    "local ring": ({"attention_pattern": "local(5)", "position": "rope"}, {"ring": True}),
    "sinks": ({"attention_pattern": "sinks(2, 5)", "position": "none"}, {"ring": True}),
    "strided": ({"attention_pattern": "strided(3)"}, {}),
    "grouped rope": ({"n_kv_head": 2, "position": "rope"}, {}),
    "experts": ({"moe_num_experts": 4}, {}),
    "keel": ({"norm": "keel"}, {}),
}
MODELS: dict[str, GPT2Model] = {}


def model_of(name: str) -> GPT2Model:
    if name not in MODELS:
        torch.manual_seed(1)
        MODELS[name] = byte_model(**PATTERNS[name][0])
    return MODELS[name]


def crowd(seed: int, name: str, limits: Limits, **cache: Any) -> tuple[Engine, list[Ask], Any]:
    """许多请求在随机的时刻来，有的中途取消：(引擎, 各请求, 事件)。"""
    rng = random.Random(seed)
    engine = make_engine(model_of(name), rng.randint(2, 6), limits, **PATTERNS[name][1], **cache)
    asks = [some_ask(rng) for _ in range(rng.randint(4, 12))]
    arrival = {number: rng.randint(0, 20) for number in range(len(asks))}
    leaves = {n: arrival[n] + rng.randint(0, 12) for n in arrival if rng.random() < 0.2}

    def each(step: int) -> None:
        for number, ask in enumerate(asks):
            if arrival[number] == step:
                engine.submit(Order(number, (ask,)))
            if leaves.get(number) == step:
                engine.cancel(number)

    found: dict[tuple[int, int], list[Event]] = {}
    for step in range(2000):
        each(step)
        for event in engine.step() if engine.busy else []:
            found.setdefault((event.order, event.index), []).append(event)
        check(engine)
        if step > 40 and not engine.busy:
            break
    assert not engine.busy and engine.rows.free == engine.flat.cache.rows
    return (
        engine,
        [ask for n, ask in enumerate(asks) if n not in leaves],
        {k: v for k, v in found.items() if k[0] not in leaves}
        | {("kept",): [n for n in range(len(asks)) if n not in leaves]},
    )


def every_text_is_its_own(seed: int) -> None:
    name = list(PATTERNS)[seed % len(PATTERNS)]
    chunk = (1, 3, 7, 256)[seed % 4]
    pace = Pace(chunk=chunk, max_stall=random.Random(seed).choice([0.0, 0.02, 9.0]))
    # 不猜、n 元组、小模型（一半由它自己来猜：全对；一半是别的模型：多半错）。
    guess = (False, True, model_of(name) if seed % 2 else model_of("causal"))[seed % 3]
    engine, asks, found = crowd(seed, name, Limits(pace=pace), guess=guess, max_chunk=20)
    assert guess or not engine.counts.drafted
    for number, ask in zip(found.pop(("kept",)), asks, strict=True):
        events = found[number, 0]
        assert (text(events), events[-1].finish) == alone(model_of(name), ask)


@pytest.mark.parametrize("seed", range(10))
def test_a_text_does_not_depend_on_what_else_runs(seed: int) -> None:
    every_text_is_its_own(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 300))
def test_three_hundred_crowds(seed: int) -> None:
    every_text_is_its_own(seed)


@pytest.mark.parametrize("speculate", [False, True])
def test_int8_keys_do_not_depend_on_the_crowd(speculate: bool) -> None:
    """int8 的键值有误差，但与旁边有谁、借不借、猜不猜无关。"""
    rng, model = random.Random(5), model_of("causal")
    asks = [some_ask(rng) for _ in range(8)]
    limits = Limits(pace=Pace(chunk=5))
    many = run(
        make_engine(model, 3, limits, guess=speculate, kv_dtype="int8"),
        [Order(i, (ask,)) for i, ask in enumerate(asks)],
    )
    for i, ask in enumerate(asks):
        single = run(make_engine(model, 1, kv_dtype="int8"), [Order(0, (ask,))])
        assert text(many[i, 0]) == text(single[0, 0])


def test_a_borrowed_prefix_changes_nothing() -> None:
    engine, model = make_engine(model_of("causal"), 3), model_of("causal")
    rng, shared = random.Random(0), tuple(range(60, 90))
    for number in range(12):
        # 有的借提示，有的借别人写出来的，有的整个相同。
        length = rng.choice([9, 20, 30])
        prompt = shared[:length] + ((number,) if number % 3 else ())
        ask = some_ask(rng, prompt=prompt, max_tokens=8)
        events = run(engine, [Order(number, (ask,))])[number, 0]
        assert text(events) == alone(model, ask)[0]
        assert events[-1].cached <= len(prompt) - 1
        assert bool(number) == bool(events[-1].cached)
    assert engine.counts.borrowed > 100


def test_what_was_written_can_be_borrowed_too() -> None:
    engine = make_engine(model_of("causal"))
    ask = Ask(prompt=(1, 2, 3), max_tokens=20, sampling=SamplingConfig(temperature=0))
    first = ids(run(engine, [Order(0, (ask,))])[0, 0])
    more = Ask(prompt=(1, 2, 3, *first), max_tokens=4)
    assert run(engine, [Order(1, (more,))])[1, 0][-1].cached == 22


def test_names_of_other_keys_lend_nothing() -> None:
    engine = make_engine(model_of("causal"))
    cached = []
    for number, space in enumerate(["a", "b", "a"]):
        ask = Ask(prompt=tuple(range(20)), max_tokens=2, space=space)
        cached.append(run(engine, [Order(number, (ask,))])[number, 0][-1].cached)
    assert cached == [0, 0, 19]


def test_several_choices_read_the_prompt_once() -> None:
    engine, model = make_engine(model_of("causal"), 3), model_of("causal")
    asks = tuple(
        Ask(prompt=tuple(range(30)), max_tokens=6, seed=50 + i, leader=None if i == 0 else 0,
            cache_prompt=False)
        for i in range(5)
    )  # fmt: skip
    found = run(engine, [Order(0, asks)])
    for i, ask in enumerate(asks):
        assert text(found[0, i]) == alone(model, ask)[0]
        assert found[0, i][-1].cached == (29 if i else 0)


def test_speculation_writes_the_same_and_pays_on_copies() -> None:
    """贪心的小模型爱重复：猜得中，步数少得多。"""
    model, steps = model_of("grouped rope"), []
    for speculate in (False, True):
        engine = make_engine(model, 2, guess=speculate)
        ask = Ask(
            prompt=(5, 6) * 6, max_tokens=36, sampling=SamplingConfig(temperature=0), logprobs=3
        )
        events = run(engine, [Order(0, (ask,))])[0, 0]
        assert text(events) == alone(model, ask)[0]
        assert len(ids(events)) == 36
        steps.append(engine.counts.steps)
    assert engine.counts.accepted > 0 and steps[1] < steps[0]


@pytest.mark.parametrize("temperature", [0, 0.7, 1])
def test_a_model_that_guesses_for_itself_is_always_right(temperature: float) -> None:
    """同样的模型、同样的均匀数：每个都猜中；文字照旧。"""
    model = model_of("causal")
    engine = make_engine(model, 2, guess=model)
    asks = [Ask(prompt=(9, i), max_tokens=33, seed=i, sampling=SamplingConfig(
        temperature=temperature)) for i in range(4)]  # fmt: skip
    found = run(engine, [Order(i, (ask,)) for i, ask in enumerate(asks)])
    assert [text(found[i, 0]) for i in range(4)] == [alone(model, ask)[0] for ask in asks]
    assert engine.counts.accepted == engine.counts.drafted > 60


def test_where_guessing_does_not_pay_nothing_is_guessed() -> None:
    engine = make_engine(model_of("causal"), 1, guess=True)
    engine.costs = COSTS
    ask = Ask(prompt=(5, 6) * 6, max_tokens=30, sampling=SamplingConfig(temperature=0))
    run(engine, [Order(0, (ask,))])
    assert engine.counts.drafted == 0, "each token of COSTS costs as much as a step"


@pytest.mark.parametrize("seed", range(16))
def test_text_comes_exactly_once(seed: int) -> None:
    """I10：各片相接就是整段；概率一个词元一条，收尾的分隔符也有。"""
    rng, model = random.Random(seed), model_of("causal")
    ask = some_ask(rng, logprobs=2, stop_strings=rng.choice([(), ("e", "fg"), ("\u00e9",)]))
    events = run(make_engine(model), [Order(0, (ask,))])[0, 0]
    tokens = ids(events)
    whole = BYTES.decode(t for t in tokens if t != 256)
    cuts = [at for stop in ask.stop_strings if (at := whole.find(stop)) >= 0]
    assert text(events) == whole[: min(cuts, default=None)]
    assert events[-1].finish == ("length" if len(tokens) == ask.max_tokens and not cuts
                                 and tokens[-1] != 256 else "stop")  # fmt: skip
    if cuts:
        assert events[-1].reason in ask.stop_strings
    elif events[-1].finish == "stop":
        assert events[-1].reason == 256
    assert all(len(t.top) == 2 for event in events for t in event.tokens)


@torch.inference_mode()
def test_prompt_scores_are_the_models() -> None:
    model, prompt = model_of("strided"), tuple(range(40, 80))
    engine = make_engine(model, 2, Limits(pace=Pace(chunk=7)))
    # 先暖一行：打分的请求不许借它。
    run(engine, [Order(0, (Ask(prompt=prompt, max_tokens=1),))])
    for most in (0, 1):
        ask = Ask(prompt=prompt, max_tokens=most, logprobs=3, score_prompt=True)
        (event,) = run(engine, [Order(1 + most, (ask,))])[1 + most, 0]
        logs = model(torch.tensor([prompt]))["logits"][0].log_softmax(-1)
        assert event.prompt[0].logprob is None and len(event.prompt) == 40
        for i, one in enumerate(event.prompt[1:]):
            assert one.logprob == pytest.approx(float(logs[i, prompt[i + 1]]), abs=1e-12)
            best = logs[i].topk(3)
            assert [t for t, _ in one.top] == best.indices.tolist()
        assert len(event.tokens) == most and event.finish == "length" and event.cached == 0


def test_penalties_bias_and_least_tokens() -> None:
    model = model_of("causal")
    greedy = SamplingConfig(temperature=0)

    def tokens(**given: Any) -> list[int]:
        ask = Ask(prompt=(1, 2, 3), max_tokens=12, sampling=greedy, **given)
        return ids(run(make_engine(model), [Order(0, (ask,))])[0, 0])

    plain = tokens()
    assert tokens(logit_bias={77: 100.0}) == [77] * 12
    assert plain[0] not in tokens(logit_bias={plain[0]: -100.0})
    assert len(set(tokens(presence_penalty=2000.0))) == 12
    assert len(set(tokens(frequency_penalty=2000.0))) == 12
    assert tokens(stop_ids=frozenset({plain[2]})) == plain[: plain.index(plain[2]) + 1]
    later = tokens(stop_ids=frozenset({plain[2]}), min_tokens=6)
    assert len(later) >= 6 and plain[2] not in later[:6]


def test_single_precision_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = byte_model(torch.float32), random.Random(3)
    asks = [some_ask(rng) for _ in range(30)]
    found = run(make_engine(model, 6), [Order(i, (ask,)) for i, ask in enumerate(asks)])
    same = sum(text(found[i, 0]) == alone(model, ask)[0] for i, ask in enumerate(asks))
    assert same >= 29


def _never_truncates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.models.transformer.cache.row_cache.RowCache.truncate",
                        lambda self, row, length: None)  # fmt: skip


def _borrows_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rows._longest

    def longest(self: Rows, prompt: Any, space: str) -> Any:
        row, length = real(self, prompt, space)
        return row, length + (row is not None and length < self.cache.lengths[row])

    monkeypatch.setattr(Rows, "_longest", longest)


def _shares_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.rand(5000, dtype=torch.float64).tolist()
    monkeypatch.setattr("app.serving.draws._point", lambda run: stream.pop())


@pytest.mark.parametrize("mutant", [_never_truncates, _borrows_one_too_many, _shares_one_stream])
def test_planted_mistakes_are_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)

    def suite() -> None:
        for seed in (0, 4, 6):
            every_text_is_its_own(seed)
        test_a_borrowed_prefix_changes_nothing()
        test_speculation_writes_the_same_and_pays_on_copies()

    with pytest.raises((AssertionError, ValueError)):
        suite()


@pytest.mark.parametrize("pattern", ["causal", "longformer(1, 1)"])
def test_a_context_of_one_leaves_no_room(pattern: str) -> None:
    with pytest.raises(ValueError, match="leaves no room to write"):
        serve_model("small", byte_model(context_size=1, attention_pattern=pattern), BYTES)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_models_are_served_alike(name: str) -> None:
    torch.manual_seed(3)
    changes = {"vocab_size": 257, "context_size": 48, "n_layer": 2}
    model = quantized(float_model(**changes), SCHEMES[name])
    served = serve_model("small", model, BYTES, rows=3)
    rng = random.Random(1)
    asks = [some_ask(rng, sampling=SamplingConfig(temperature=0)) for _ in range(8)]
    found = run(served.engine, [Order(i, (ask,)) for i, ask in enumerate(asks)])
    assert [text(found[i, 0]) for i in range(8)] == [alone(model, ask)[0] for ask in asks]

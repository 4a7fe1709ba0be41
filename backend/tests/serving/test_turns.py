"""引擎轮到谁、等多久：取消、坏掉的行、公平、队与期限（I7 到 I9）。文字本身见 test_engine.py。"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.generation.config import SamplingConfig
from app.models.transformer.cache.row_cache import RowCache
from app.serving.drafting import DraftModel
from app.serving.draws import draw
from app.serving.engine import Limits
from app.serving.flat_step import FlatStep
from app.serving.request import Ask, Order
from app.serving.running import Running
from app.serving.schedule import Pace
from tests.serving.helpers import BYTES, Clock, alone, byte_model, make_engine, run, some_ask, text


class Watched:
    """一个 FlatStep，记着每次几个词元；broken 时抛错。"""

    def __init__(self, flat: FlatStep) -> None:
        self.flat, self.cache, self.broken, self.sizes = flat, flat.cache, True, list[int]()

    def __call__(self, ids: Any, spans: Any, keep: Any) -> Any:
        self.sizes.append(len(ids))
        if self.broken:
            raise RuntimeError("planted")
        return self.flat(ids, spans, keep)


@pytest.mark.parametrize("seed", range(12))
def test_cancelled_anywhere_the_others_go_on(seed: int) -> None:
    rng, model = random.Random(seed), byte_model()
    engine = make_engine(model, 2, Limits(pace=Pace(chunk=4)), guess=bool(seed % 2))
    victim, other = some_ask(rng), some_ask(rng)
    late = some_ask(rng)
    when = rng.randint(0, 8)
    orders = [Order(0, (victim, victim)), Order(1, (other,)), Order(2, (late,))]

    def each(step: int) -> None:
        if step == when:
            engine.cancel(0)
            assert not any(r.order == 0 for r in [*engine._running, *engine._queue])

    found = run(engine, orders, each)
    assert text(found[1, 0]) == alone(model, other)[0]
    assert text(found[2, 0]) == alone(model, late)[0]


@pytest.mark.parametrize("way", ["nan", "raises"])
@pytest.mark.parametrize("seed", range(5))
def test_a_poisoned_row_dies_alone(way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """一行的 logits 成了 NaN，或有它在前向就抛错：只有它得到错误，别的文字一字不差。"""
    rng, model = random.Random(seed), byte_model()
    engine = make_engine(model, 4)
    asks = [some_ask(rng, max_tokens=20, stop_strings=(), stop_ids=frozenset()) for _ in range(4)]
    victim = rng.randrange(4)
    secret, calls, real = 200 + victim, [0], model.embed.forward
    asks = [Ask(prompt=(200 + i, *a.prompt[:9]), max_tokens=9, seed=i) for i, a in enumerate(asks)]
    wanted = [alone(model, ask)[0] for ask in asks]

    def embed(input_ids: Any, where: Any) -> Any:
        calls[0] += 1
        x = real(input_ids, where)
        bad = (input_ids == secret) & (where.pos == 0)
        if way == "raises" and bool(bad.any()):
            raise RuntimeError("planted")
        return x.masked_fill(bad[..., None], float("nan"))

    monkeypatch.setattr(model.embed, "forward", embed)
    found = run(engine, [Order(i, (ask,)) for i, ask in enumerate(asks)])
    for i in range(4):
        if i == victim:
            assert [event.failure for event in found[i, 0]] == ["internal"]
        else:
            assert text(found[i, 0]) == wanted[i]
    assert calls[0] <= 9 + 2 * 2 + 2
    monkeypatch.undo()
    # 那一行清过零，给下一个人用。
    again = run(engine, [Order(9 + i, (ask,)) for i, ask in enumerate(asks)])
    assert [text(again[9 + i, 0]) for i in range(4)] == wanted


def test_a_row_with_nothing_to_pick_fails_alone() -> None:
    """每个词元都不许写的一段（与它的请求）得到错误，同一步里的别人照写。"""
    model, rng = byte_model(), random.Random(3)
    others = [some_ask(rng, max_tokens=9) for _ in range(2)]
    none = Ask(prompt=(1, 2), max_tokens=4, min_tokens=1, stop_ids=frozenset(range(257)))
    engine = make_engine(model, 4)
    orders = [Order(0, (others[0],)), Order(1, (none, none)), Order(2, (others[1],))]
    found = run(engine, orders)
    assert [event.failure for event in found[1, 0]] == ["internal"] and (1, 1) not in found
    for number, ask in zip((0, 2), others, strict=True):
        assert text(found[number, 0]) == alone(model, ask)[0]


def test_what_the_host_holds_goes_to_the_device_of_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """没有卡也看得出：meta 上的 logits，出现过的词元与顶替坏数的 NaN 要在同一处。"""
    ask = Ask(prompt=(1, 2), max_tokens=2, sampling=SamplingConfig(repetition_penalty=1.3))
    waiting = Running(0, 0, ask, BYTES, 257)
    places: list[torch.device] = []

    def pick(logits: Any, config: Any, points: Any, seen: Any) -> torch.Tensor:
        places.append(seen.device)
        return torch.zeros(len(logits), dtype=torch.int64)

    monkeypatch.setattr("app.serving.draws.pick", pick)
    assert draw(torch.empty(1, 257, device="meta"), [waiting]) == [0]
    engine = make_engine(byte_model(), 1)
    engine.submit(Order(0, (ask,)))
    engine._admit()
    turns = engine._turns()
    monkeypatch.setattr(engine, "flat", Watched(engine.flat))
    monkeypatch.setattr(engine, "model", SimpleNamespace(device=torch.device("meta")))
    (part,) = engine._forward(turns)
    assert part is not None and [*places, part.device] == [torch.device("meta")] * 2


def test_every_admitted_row_goes_on_and_no_step_is_long() -> None:
    """I9：长提示之外还有人写，一步不超过时限；短提示三步之内写出第一个。"""
    engine = make_engine(byte_model(context_size=400), 4, Limits(pace=Pace(max_stall=0.03)))
    writer = Ask(prompt=(1,), max_tokens=80, sampling=SamplingConfig(temperature=0))
    long = Ask(prompt=tuple(i % 250 for i in range(390)), max_tokens=4)
    sizes, waited = [], []
    engine.submit(Order(0, (writer,)))
    engine.step()
    engine.submit(Order(1, (long,)))
    engine.step()
    engine.submit(Order(2, (Ask(prompt=(4, 5, 6), max_tokens=2),)))
    first: dict[int, int] = {}
    for step in range(1, 200):
        before = engine.counts.step_tokens
        for event in engine.step():
            first.setdefault(event.order, step)
        sizes.append(engine.counts.step_tokens - before)
        waited += [r.waited for r in engine._running]
    assert first[2] <= 3 and not engine.busy
    assert max(sizes[:60]) <= 30 and max(waited) <= 5


def test_the_long_prompt_is_not_starved_by_short_ones() -> None:
    clock = Clock()
    engine = make_engine(byte_model(context_size=100), 3, Limits(pace=Pace(chunk=8)), clock)
    engine.submit(Order(0, (Ask(prompt=tuple(range(90)), max_tokens=1),)))
    done: dict[int, int] = {}
    for step in range(300):
        clock.now += 0.1
        if step < 200:
            engine.submit(Order(1 + step, (Ask(prompt=tuple(range(step % 8, 8)), max_tokens=1),)))
        for event in engine.step():
            done.setdefault(event.order, step)
    assert done[0] < 120


def test_eight_equal_clients_get_equal_shares() -> None:
    engine = make_engine(byte_model(), 8)
    for i in range(8):
        engine.submit(Order(i, (Ask(prompt=(i, 1, 2), max_tokens=40),)))
    made = [0] * 8
    for _ in range(20):
        for event in engine.step():
            made[event.order] += len(event.tokens)
    assert sum(made) ** 2 / (8 * sum(n * n for n in made)) >= 0.99


def test_the_queue_has_an_end() -> None:
    engine = make_engine(byte_model(), 1, Limits(queue=2))
    for i in range(5):
        engine.submit(Order(i, (Ask(prompt=(1, 2), max_tokens=3),)))
    found = run(engine)
    full = [i for i in range(5) if found[i, 0][-1].failure == "full"]
    assert full == [2, 3, 4]


def test_deadlines() -> None:
    clock = Clock()
    engine = make_engine(byte_model(), 1, clock=clock)
    ask = Ask(prompt=(1, 2), max_tokens=40)
    orders = [Order(0, (ask,), until=5.0), Order(1, (ask,), wait_until=3.0)]
    found = run(engine, orders, lambda step: setattr(clock, "now", float(step)))
    assert [found[i, 0][-1].failure for i in (0, 1)] == ["deadline", "deadline"]


def test_an_order_half_written_no_longer_waits() -> None:
    """八段、两行：等的时限到了时还有几段在排队，但它早已开始。"""
    clock = Clock()
    engine = make_engine(byte_model(), 2, clock=clock)
    asks = tuple(Ask(prompt=(i, 1), max_tokens=3, stop_ids=frozenset()) for i in range(8))
    orders = [Order(0, asks, wait_until=2.0)]
    found = run(engine, orders, lambda step: setattr(clock, "now", float(step)))
    assert [found[0, i][-1].finish for i in range(8)] == ["length"] * 8


def test_a_follower_that_writes_nothing_waits_for_the_scores_of_its_leader() -> None:
    engine = make_engine(byte_model(), 2)
    leader = Ask(prompt=(1, 2, 3), max_tokens=0, logprobs=1, score_prompt=True)
    follower = Ask(prompt=(1, 2, 3), max_tokens=0, logprobs=1, leader=0)
    engine.submit(Order(0, (leader, follower)))
    told = [event for _ in range(4) for event in engine.step()]
    assert [event.index for event in told] == [0, 1] and len(told[0].prompt) == 3


def test_a_draft_model_reads_a_long_text_in_pieces_and_forgets_what_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """追上之前不猜；前向失败的词元不算读过。猜的与一口气读完、没有失败过的相同。"""
    model = byte_model()
    one, two = (
        DraftModel(FlatStep(model, RowCache(model.config, 2, dtype=torch.float64, **room)), 257)
        for room in ({}, {"max_chunk": 8})
    )
    runs = [
        Running(i, 0, Ask(prompt=tuple(range(length)), max_tokens=9, seed=i), BYTES, 257)
        for i, length in enumerate((30, 3))
    ]
    for row, each in enumerate(runs):
        each.row = row
    wanted = [(each, 3) for each in runs]
    watched = Watched(two._flat)
    monkeypatch.setattr(two, "_flat", watched)
    with pytest.raises(RuntimeError, match="planted"):
        two.draft(wanted)
    watched.broken = False
    right = one.draft(wanted)
    first, *_, last = (two.draft(wanted) for _ in range(5))
    assert max(watched.sizes) <= 8 and first == {0: [], 1: right[1]} and last == right


def test_a_draft_model_that_fails_stops_guessing_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = byte_model()
    engine = make_engine(model, 2, guess=model)
    asks = [Ask(prompt=(9, i), max_tokens=12, seed=i) for i in range(2)]
    assert isinstance(engine.drafter, DraftModel)
    monkeypatch.setattr(engine.drafter, "_flat", Watched(engine.drafter._flat))
    found = run(engine, [Order(i, (ask,)) for i, ask in enumerate(asks)])
    assert [text(found[i, 0]) for i in range(2)] == [alone(model, ask)[0] for ask in asks]
    assert engine.drafter is None and caplog.text.count("no more guesses") == 1


def test_slots_and_the_speed_of_late() -> None:
    """给人看的数：各行借了几个、写了几个；近两秒每秒几个词元，停了就是零。"""
    clock = Clock()
    engine = make_engine(byte_model(), rows=2, clock=clock)
    prompt = tuple(range(20))
    run(engine, [Order(0, (Ask(prompt=prompt, max_tokens=3, seed=1),))])
    clock.now = 50.0
    engine.submit(Order(1, (Ask(prompt=(*prompt, 77), max_tokens=20, seed=1),)))
    for _ in range(11):
        engine.step()
        clock.now += 0.1
    busy, idle = engine.slots()
    assert busy == {"row": 0, "busy": True, "tokens": 31, "cached": 20, "made": 11}
    assert idle == {"row": 1, "busy": False, "tokens": 0, "cached": 0, "made": 0}
    assert engine.tokens_per_second == pytest.approx(10 / 1.1)
    clock.now += 3
    assert engine.tokens_per_second == 0

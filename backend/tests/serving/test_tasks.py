"""看里面的片排在各步之间：每两步之间报的价之和不超过 max_stall，而总有一片做。不看钟。"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inspection.look import Wish, look
from app.inspection.slices import Slice, forward_cost
from app.serving.engine import Limits
from app.serving.request import Ask, Order
from app.serving.schedule import Costs, Pace
from app.serving.tasks import Task, Tasks, price, rows_within
from app.serving.worker import Worker
from tests.serving.helpers import COSTS, byte_model, make_engine
from tests.serving.helpers import run as run_engine

STALL = 0.02


def sliced(prices: list[int], log: list[tuple[str, int]], name: str = "") -> Iterator[Slice]:
    for tokens in prices:
        yield Slice(tokens, 1)
        log.append((name, tokens))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=3),
    st.integers(50, 120),
)
def test_a_round_never_exceeds_its_seconds(jobs: list[list[int]], most: int) -> None:
    """每片都不超过 most：每轮之和也不；每件都做完，次序不乱。"""
    tasks, log, done = Tasks(), list[tuple[str, int]](), list[int]()
    for number, prices in enumerate(jobs):
        tasks.add(
            Task(
                sliced(prices, log, str(number)),  # type: ignore[arg-type]
                lambda piece: float(piece.tokens),
                lambda result, error, n=number: done.append(n),
            )
        )
    rounds = 0
    while tasks.busy:
        before = len(log)
        spent = tasks.run(float(most))
        assert spent == sum(tokens for _, tokens in log[before:]) <= most
        rounds += 1
        assert rounds < 200
    assert sorted(done) == list(range(len(jobs)))
    for number, prices in enumerate(jobs):
        assert [tokens for name, tokens in log if name == str(number)] == prices


def test_a_dear_slice_still_runs_alone() -> None:
    tasks, log = Tasks(), list[tuple[str, int]]()
    tasks.add(Task(sliced([5, 900, 5], log), lambda piece: float(piece.tokens), lambda *_: None))  # type: ignore[arg-type]
    rounds = [tasks.run(10.0) for _ in range(4)]
    assert not tasks.busy and rounds[:3] == [5.0, 900.0, 5.0]


def test_running_texts_wait_no_longer_than_max_stall() -> None:
    """价目是假的：一个词元一毫秒。走着三段文字时看里面，两步之间的价不超过 max_stall。"""
    model = byte_model(n_layer=3)
    limits = Limits(pace=Pace(max_stall=STALL))
    asks = [Ask(prompt=(65 + i,), max_tokens=30, seed=i) for i in range(3)]
    orders = [Order(i, (ask,)) for i, ask in enumerate(asks)]
    alone = run_engine(make_engine(model, limits=limits), orders)
    engine = make_engine(model, limits=limits)
    told: list[Any] = []
    worker = Worker({"one": engine}, told.extend)
    rows = rows_within(COSTS, model.config, 257 * model.config.n_embed, STALL, 256)
    wish = Wish(width=257, maps=(0, 1, 2), lens=True, norms=True, next=True, rows=rows)
    results: list[Any] = []
    task = Task(
        look(model, range(40), wish),
        lambda piece: price(COSTS, model.config, piece),
        lambda result, error: results.append(error or result),
    )
    for order in orders:
        engine.submit(order)
    worker.tasks.add(task)
    spent = []
    whole = worker.tasks.run
    worker.tasks.run = lambda seconds: spent.append(whole(seconds)) or spent[-1]  # type: ignore[method-assign,func-returns-value]
    for _ in range(400):
        worker.round()
        if not engine.busy and not worker.tasks.busy:
            break
    assert len(results) == 1 and not isinstance(results[0], BaseException)
    # 头一片之后，排得下就排，排不下就等下一步。
    assert max(spent) <= STALL and sum(s > 0 for s in spent) > 4
    for order in orders:
        mine = [event for event in told if event.order == order.id]
        assert [e.text for e in mine] == [e.text for e in alone[order.id, 0]]


@pytest.mark.parametrize("coming", [0, 1])
def test_requests_that_come_together_are_read_together(
    coming: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """空闲时头一个来了，等一会儿：第二个晚一点来，也赶得上同一步；已在路上的，不值得等也等。"""
    monkeypatch.setattr("app.serving.worker._NEXT", 0.5)
    monkeypatch.setattr("app.serving.worker._COMING", 0.5)
    each = 1e-6 if coming else 10.0
    engine = make_engine(byte_model(), costs=Costs(((1, each), (2, 2 * each))))
    first, told = list[int](), list[Any]()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: first.append(engine.waiting) or step())
    worker = Worker({"one": engine}, told.extend)
    worker.coming = lambda: coming
    worker.start()
    for number in range(2):
        order = Order(number, (Ask(prompt=(65, 66), max_tokens=2),))
        worker.post(lambda order=order: engine.submit(order))
        time.sleep(0.02)
    until = time.monotonic() + 20
    while len([event for event in told if event.finish]) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    worker.stop()
    assert first[0] == 2 and sum(event.finish is not None for event in told) == 2


def test_nobody_waits_for_company_beside_running_texts() -> None:
    engine = make_engine(byte_model(), 1, costs=Costs(((1, 0.1), (2, 0.2))))
    assert engine.company == 0
    for number in range(2):
        engine.submit(Order(number, (Ask(prompt=(65,) * 4, max_tokens=9),)))
        assert engine.company == pytest.approx(0.02 * (number + 1))
    engine.step()
    assert engine.waiting == 1 and engine.company == 0


def test_prices_follow_the_costs() -> None:
    config = byte_model(n_layer=2).config
    costs = Costs(((1, 0.010), (9, 0.018)))
    assert price(costs, config, Slice(5, forward_cost(config))) == pytest.approx(0.014)
    assert price(costs, config, Slice(5, forward_cost(config) // 2)) == pytest.approx(0.007)
    rows = rows_within(costs, config, forward_cost(config), 0.020, 64)
    assert price(costs, config, Slice(rows, forward_cost(config))) <= 0.020
    assert price(costs, config, Slice(2 * rows, forward_cost(config))) > 0.020
    assert rows_within(costs, config, 10 * forward_cost(config), 0.020, 64) == 1


def test_a_dropped_task_does_no_more_work_and_says_why() -> None:
    tasks, log, said = Tasks(), list[tuple[str, int]](), list[Any]()
    steps = sliced([1] * 9, log)
    task = Task(steps, lambda piece: 1.0, lambda *given: said.append(given))  # type: ignore[arg-type]
    tasks.add(task)
    tasks.run(2.0)
    task.drop()
    tasks.run(2.0)
    assert not tasks.busy and len(log) == 2 and said == []
    tasks.add(Task(sliced([1], log), lambda piece: 1.0, lambda *given: said.append(given)))  # type: ignore[arg-type]
    error = RuntimeError("closing")
    tasks.drop_all(error)
    assert said == [(None, error)] and not tasks.busy


def test_slices_run_without_gradients() -> None:
    seen: list[bool] = []

    def steps() -> Iterator[Slice]:
        yield Slice(1, 1)
        seen.append(torch.is_inference_mode_enabled())

    task = Task(steps(), lambda piece: 0.0, lambda *_: None)  # type: ignore[arg-type]
    task.advance()
    task.advance()
    assert seen == [True] and not torch.is_inference_mode_enabled()

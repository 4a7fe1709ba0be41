"""引擎的测试共用的：一个字节分词器的小模型、假钟、跑到没有事做为止。"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from app.data.tokenizers import ByteTokenizer
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model
from app.models.transformer.cache.row_cache import RowCache
from app.serving.drafting import Drafter, DraftModel, NGramDrafter
from app.serving.engine import Engine, Limits
from app.serving.flat_step import FlatStep
from app.serving.request import Ask, Event, Order
from app.serving.schedule import Costs
from tests.models.helpers import tiny_model

# 假的价目：一个词元 1 毫秒，多一个多 1 毫秒。
COSTS = Costs(((1, 0.001), (2, 0.002)))
# 多算几乎不要钱：什么都值得猜。
CHEAP = Costs(((1, 1.0), (16, 1.01)))
BYTES = ByteTokenizer()

KEYS = ("a-key-of-sixteen-chars", "another-key-of-sixteen")
LONG = {"prompt": "x", "max_tokens": 120, "ignore_eos": True}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def byte_model(dtype: torch.dtype = torch.float64, **changes: Any) -> GPT2Model:
    changes = {"vocab_size": 257, "context_size": 48, "n_layer": 2, **changes}
    return tiny_model(dtype, **changes)


def make_engine(
    model: GPT2Model,
    rows: int = 4,
    limits: Limits | None = None,
    clock: Any = None,
    guess: bool | GPT2Model = False,
    costs: Costs = COSTS,
    **cache: Any,
) -> Engine:
    """guess: True = n 元组，一个模型 = 由它猜；那时多算几乎不要钱，不看 costs。"""
    dtype = model.embed.wte.weight.dtype
    flat = FlatStep(model, RowCache(model.config, rows, dtype=dtype, **cache))
    drafter: Drafter | None = NGramDrafter() if guess else None
    if isinstance(guess, GPT2Model):
        small = RowCache(guess.config, rows, dtype=guess.embed.wte.weight.dtype)
        drafter = DraftModel(FlatStep(guess, small), 257)
        drafter.seconds = 0.0
    costs = CHEAP if guess else costs
    return Engine(flat, BYTES, limits, drafter=drafter, costs=costs, clock=clock or Clock())


def run(
    engine: Engine, orders: Sequence[Order] = (), each: Callable[[int], object] = lambda step: None
) -> dict[tuple[int, int], list[Event]]:
    """交上去，走到没有事做；each(步) 在每步之前。"""
    for order in orders:
        engine.submit(order)
    found: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for step in range(5000):
        each(step)
        if not engine.busy:
            break
        for event in engine.step():
            found[event.order, event.index].append(event)
        check(engine)
    assert not engine.busy and not engine.rows.busy
    return found


def check(engine: Engine) -> None:
    """每步之后都要成立（I6）。"""
    busy = engine.rows.busy
    assert len(busy) == engine.running and engine.rows.free + len(busy) == engine.flat.cache.rows
    for run in engine._running:
        assert run.row in busy
        held = engine.rows.held[run.row, : engine.flat.cache.lengths[run.row]].tolist()
        assert held == run.tokens[: len(held)]


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def ids(events: Sequence[Event]) -> list[int]:
    return [token.id for event in events for token in event.tokens]


def alone(model: GPT2Model, ask: Ask) -> tuple[str | None, str]:
    """complete 自己写的：(文字, 为何结束)。"""
    done = complete(
        model,
        [list(ask.prompt)],
        Options(
            max_new_tokens=ask.max_tokens,
            sampling=ask.sampling,
            stop_ids=tuple(ask.stop_ids),
            stop_strings=ask.stop_strings,
        ),
        tokenizer=BYTES,
        seeds=[ask.seed],
    )[0]
    return done.text, done.finish


def some_ask(rng: random.Random, **fixed: Any) -> Ask:
    """随机的一段；一半的提示有共同的开头，有的靠重复逼出好猜的文字。"""
    start = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18] if rng.random() < 0.5 else []
    prompt = (*start, *(rng.randrange(257) for _ in range(rng.randint(1, 12))))
    sampling = rng.choice(
        [
            SamplingConfig(temperature=0),
            SamplingConfig(),
            SamplingConfig(temperature=0.7, top_k=9, top_p=0.9),
            SamplingConfig(min_p=0.05, repetition_penalty=1.3),
        ]
    )
    values: dict[str, Any] = {
        "prompt": prompt, "max_tokens": rng.randint(1, 48 - len(prompt)), "sampling": sampling,
        "seed": rng.randrange(2**40), "stop_ids": frozenset({256}),
        "stop_strings": rng.choice([(), ("e",), ("ab", "\n")]),
    }  # fmt: skip
    return Ask(**{**values, **fixed})

"""引擎：一步 = 收行、分词元、一次没有填充的前向、各行选词元。没有线程，没有钟，没有 HTTP。

承诺：一段文字只由它的提示、设置与种子决定；旁边有谁、前缀是不是借的、猜没猜，都不改变它
（双精度下恰好，测试 I1、I4、I5；单精度下末位的舍入可能使并列者换位）。
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from app.data.tokenizers import Tokenizer
from app.generation.sampling import NOT_FINITE
from app.models.transformer import GPT2Model
from app.models.transformer.cache.row_cache import Span
from app.serving.costs import measure
from app.serving.drafting import Drafter
from app.serving.draws import detailed, draw, joined, scored
from app.serving.flat_step import FlatStep
from app.serving.request import Event, Failure, Order, Scored
from app.serving.rows import Rows
from app.serving.running import Running
from app.serving.schedule import Costs, Drift, Need, Pace, share
from app.serving.speed import Counts, Speed

_LOG = logging.getLogger(__name__)
# 前向可以怎样失败；别的是程序的错。
_FAILS = (RuntimeError, ValueError, MemoryError, ArithmeticError)
# 打分的行一步至多这么多词元：logits 是 词元数 x 词表（五万时 13 MB）。
_SCORED = 64


@dataclass(frozen=True)
class Limits:
    """queue、queue_tokens：至多多少请求、多少提示词元排队。"""

    queue: int = 64
    queue_tokens: int = 32 * 1024
    pace: Pace = field(default_factory=Pace)


@dataclass
class _Turn:
    """一行这一步喂什么：ids 里最后 len(draft) 个是猜的。"""

    run: Running
    ids: list[int]
    draft: list[int]
    keep: int


class Engine:
    """一个模型。submit、cancel、step 由同一个线程调用。"""

    def __init__(
        self,
        flat: FlatStep,
        tokenizer: Tokenizer,
        limits: Limits | None = None,
        *,
        drafter: Drafter | None = None,
        costs: Costs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """drafter: 谁来猜，None = 不猜；costs: 不给就量一次，并跟着机器走。"""
        self.flat, self.tokenizer, self.limits = flat, tokenizer, limits or Limits()
        self.model: GPT2Model = flat.model
        self.context = flat.model.config.context_size
        self.width = min(tokenizer.vocab_size, flat.model.config.vocab_size)
        self.costs = measure(flat) if costs is None else costs
        self._drift = Drift() if costs is None else None
        self.rows = Rows(flat.cache, self.context)
        self.counts, self.speed, self.drafter = Counts(), Speed(), drafter
        self._clock = clock
        self._orders: dict[int, Order] = {}
        self._queue: list[Running] = []
        self._running: list[Running] = []
        self._events: list[Event] = []

    @property
    def waiting(self) -> int:
        """还有一段在排队的请求数。"""
        return len({run.order for run in self._queue})

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def tokens_per_second(self) -> float:
        return self.speed.now(self._clock())

    def slots(self) -> list[dict[str, int | bool]]:
        """每行一项：在忙没有，缓存里几个词元，占着它的那一段借了几个、写了几个。别的线程也可以问。"""
        runs = {run.row: run for run in list(self._running)}
        lengths = self.flat.cache.lengths
        return [
            {"row": row, "busy": row in runs, "tokens": tokens}
            | {"cached": runs[row].cached if row in runs else 0}
            | {"made": runs[row].made if row in runs else 0}
            for row, tokens in enumerate(lengths)
        ]

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running or self._events)

    @property
    def company(self) -> float:
        """空闲时来了请求，至多等同来的多久：读它们的二十分之一。一起读比先后读快得多（share）。"""
        if self._running or not self._queue:
            return 0.0
        return self.costs.seconds(sum(len(run.ask.prompt) for run in self._queue)) / 20

    def submit(self, order: Order) -> None:
        """排进队；满了就在下一步说 full。"""
        tokens = sum(len(run.ask.prompt) for run in self._queue)
        new = sum(len(ask.prompt) for ask in order.asks)
        full = self.waiting >= self.limits.queue
        if full or (tokens and tokens + new > self.limits.queue_tokens):
            self._fail_all(order, "full")
            return
        self._orders[order.id] = order
        now = self._clock()
        for index, ask in enumerate(order.asks):
            run = Running(order.id, index, ask, self.tokenizer, self.width)
            run.since = now
            self._queue.append(run)

    def cancel(self, order: int) -> None:
        """那次请求的几段都不写了；已经写完或没有过也无妨。"""
        self._orders.pop(order, None)
        self._queue = [run for run in self._queue if run.order != order]
        for run in [run for run in self._running if run.order == order]:
            self._leave(run)
        self._events = [event for event in self._events if event.order != order]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """走一步，给出这一步的事件。"""
        self._expire()
        self._admit()
        turns = self._turns()
        if turns:
            start = time.perf_counter()
            self._take(turns, self._forward(turns))
            self.counts.steps += 1
            tokens = sum(len(turn.ids) for turn in turns)
            self.counts.step_tokens += tokens
            self.counts.last_step = time.perf_counter() - start
            if self._drift is not None:
                self._drift.learn(self.costs.seconds(tokens), self.counts.last_step)
            self.counts.step_seconds += self.counts.last_step
            self.speed.note(self._clock(), self.counts.made)
        return self._told()

    def close_queue(self) -> None:
        """在排队的都不做了：要关门。"""
        for order in self._untouched():
            self._fail_all(self._orders[order], "closing")

    def abandon(self, failure: Failure) -> list[Event]:
        """全部放弃，给出要说的话。"""
        for order in list(self._orders.values()):
            self._fail_all(order, failure)
        return self._told()

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _expire(self) -> None:
        now, untouched = self._clock(), self._untouched()
        for order in list(self._orders.values()):
            if now >= order.until or (order.id in untouched and now >= order.wait_until):
                self._fail_all(order, "deadline")

    def _untouched(self) -> set[int]:
        """一段也还没有开始的请求：写了一半的不算在排队。"""
        queued = Counter(run.order for run in self._queue)
        return {order for order, n in queued.items() if n == len(self._orders[order].asks)}

    def _fail_all(self, order: Order, failure: Failure) -> None:
        self.cancel(order.id)
        self._events.append(Event(order.id, 0, failure=failure))

    def _admit(self) -> None:
        """先来的先进；同一提示的几段等领头的读完（打完分），再各抄一份。"""
        reading = {(r.order, r.index) for r in [*self._queue, *self._running] if r.made == 0}
        for run in list(self._queue):
            ask = run.ask
            if ask.leader is not None and (run.order, ask.leader) in reading:
                continue
            if ask.max_tokens == 0 and not ask.score_prompt:
                self._queue.remove(run)
                run.close()
                self._tell(run)
                continue
            if self.rows.free == 0:
                break
            self._queue.remove(run)
            shared = ask.cache_prompt and not ask.score_prompt
            run.row, run.cached = self.rows.take(
                ask.prompt, ask.space, shared or ask.leader is not None
            )
            self.counts.asked += len(ask.prompt)
            self.counts.borrowed += run.cached
            self.counts.prompt += len(ask.prompt)
            self._running.append(run)

    def _turns(self) -> list[_Turn]:
        now, lengths = self._clock(), self.flat.cache.lengths
        needs, by_row = [], {}
        for run in self._running:
            row = _row(run)
            by_row[row] = run
            most = _SCORED if run.ask.score_prompt else self.flat.cache.max_chunk
            left = len(run.tokens) - lengths[row]
            needs.append(Need(row, left, run.made == 0, most, run.waited, now - run.since))
        writing = sum(not need.reading for need in needs)
        # 有人在读提示时不猜：那时多算的词元不便宜。
        drafts = self._drafts() if writing == len(needs) else {}
        sizes = {row: len(draft) for row, draft in drafts.items()}
        costs = self.costs if self._drift is None else self.costs.times(self._drift.ratio)
        given = share(needs, sizes, costs, self.limits.pace)
        turns = []
        for row, run in sorted(by_row.items()):
            run.waited += 1
            if row not in given:
                continue
            run.waited, run.since = 0, now
            at, draft = lengths[row], drafts.get(row, [])
            ids = run.tokens[at : at + given[row]] + draft
            ended = at + given[row] >= len(run.tokens)
            keep = len(draft) + 1 if ended else 0
            turns.append(_Turn(run, ids, draft, len(ids) if run.ask.score_prompt else keep))
        return turns

    def _drafts(self) -> dict[int, list[int]]:
        if self.drafter is None:
            return {}
        busy, each, most = len(self._running), self.drafter.seconds, self.flat.cache.max_chunk - 1
        wanted = [
            (run, min(run.gain.size(self.costs, busy, each), run.left - 1, most))
            for run in self._running
        ]
        try:
            return self.drafter.draft(wanted)
        except _FAILS:
            # 猜不成只是慢一点：从此不猜，说一次。
            _LOG.exception("the %s failed: no more guesses from now on", self.drafter.name)
            self.drafter = None
            return {}

    def _forward(self, turns: Sequence[_Turn]) -> list[Tensor | None]:
        """各行要的 logits；一行使前向失败就对半找出它，别的行照走。"""
        keep: list[int] = []
        at = 0
        for turn in turns:
            at += len(turn.ids)
            keep += range(at - turn.keep, at)
        spans = [Span(_row(turn.run), len(turn.ids)) for turn in turns]
        try:
            logits = self.flat([i for turn in turns for i in turn.ids], spans, keep)
        except _FAILS:
            if len(turns) == 1:
                # 当作坏掉的数：下一步就只放弃它。
                return [torch.full((1, self.width), float("nan"), device=self.model.device)]
            half = len(turns) // 2
            return [*self._forward(turns[:half]), *self._forward(turns[half:])]
        parts: list[Tensor | None] = [None] * len(turns)
        if logits is not None:
            pieces = logits[:, : self.width].split([turn.keep for turn in turns])
            parts = [p if t.keep else None for p, t in zip(pieces, turns, strict=True)]
        for turn in turns:
            self.rows.wrote(_row(turn.run), turn.ids)
        return parts

    def _take(self, turns: Sequence[_Turn], parts: Sequence[Tensor | None]) -> None:
        """选词元；猜中的接着选下一个，直到猜错或写完，然后把缓存退回到真词元。"""
        wanted = [(t, logits) for t, logits in zip(turns, parts, strict=True) if logits is not None]
        if wanted:
            best = torch.cat([logits.amax(-1) for _, logits in wanted]).isfinite()
            sizes = [len(logits) for _, logits in wanted]
            for (turn, _), good in zip(wanted, best.split(sizes), strict=True):
                if not bool(good.all()):
                    self._poisoned(turn.run)
        open_turns = []
        for turn, logits in wanted:
            scoring = turn.run.ask.score_prompt and turn.run.made == 0
            last = self._score(turn.run, logits) if turn.run.row is not None and scoring else logits
            if turn.run.row is not None and last is not None:
                open_turns.append((turn, last))
        going, depth = open_turns, 0
        while going:
            rows = joined([logits[depth : depth + 1] for _, logits in going])
            runs = [turn.run for turn, _ in going]
            chosen = draw(rows, runs)
            if NOT_FINITE in chosen:
                # 没有可选的只失败自己（连同它的请求）；留下的再选一遍，选得一样。
                for run, token in zip(runs, chosen, strict=True):
                    if token == NOT_FINITE:
                        self._poisoned(run)
                going = [each for each in going if each[0].run.row is not None]
                continue
            for run, token, one in zip(runs, chosen, self._noted(rows, chosen, runs), strict=True):
                run.accept(Scored(token) if one is None else one)
                self.counts.made += 1
            going = [
                (turn, logits)
                for (turn, logits), token in zip(going, chosen, strict=True)
                if turn.run.finish is None and turn.draft[depth : depth + 1] == [token]
            ]
            depth += 1
        for turn, _ in open_turns:
            if turn.run.row is not None:
                self._settle(turn)

    def _noted(
        self, rows: Tensor, chosen: Sequence[int], runs: Sequence[Running]
    ) -> list[Scored | None]:
        wanted = [i for i, run in enumerate(runs) if run.ask.logprobs is not None]
        found: list[Scored | None] = [None] * len(runs)
        if wanted:
            k = max(runs[i].ask.logprobs or 0 for i in wanted)
            note = detailed if any(runs[i].ask.details for i in wanted) else scored
            some = note(rows[torch.tensor(wanted)], [chosen[i] for i in wanted], k)
            for i, one in zip(wanted, some, strict=True):
                found[i] = replace(one, top=one.top[: runs[i].ask.logprobs])
        return found

    def _score(self, run: Running, logits: Tensor) -> Tensor | None:
        """logits 是刚喂的各词元的；最后一块剩下的一行给第一个新词元，没有就是 None。"""
        end = self.flat.cache.lengths[_row(run)]
        begin = end - len(logits)
        targets = run.ask.prompt[begin + 1 : end + 1]
        if not run.scores:
            run.scores.append(Scored(run.ask.prompt[0]))
        if targets:
            note = detailed if run.ask.details else scored
            run.scores += note(logits[: len(targets)], targets, run.ask.logprobs or 0)
        if end < len(run.ask.prompt):
            return None
        if run.ask.max_tokens == 0:
            run.close()
            self._tell(run)
            self._leave(run)
            return None
        return logits[-1:]

    def _settle(self, turn: _Turn) -> None:
        run, cache, row = turn.run, self.flat.cache, _row(turn.run)
        if turn.draft:
            fed = cache.lengths[row] - len(turn.draft)
            # 长度说的是状态，不是差：写完的一段也走同一行。
            cache.truncate(row, len(run.tokens) - 1)
            run.gain.learn(len(turn.draft), cache.lengths[row] - fed)
            self.counts.drafted += len(turn.draft)
            self.counts.accepted += cache.lengths[row] - fed
        assert cache.lengths[row] == len(run.tokens) - 1
        self._tell(run)
        if run.finish is not None:
            self._leave(run)

    def _tell(self, run: Running) -> None:
        event = run.event()
        if event is not None:
            self._events.append(event)
        others = any(r.order == run.order and r is not run for r in [*self._queue, *self._running])
        if run.finish is not None and not others:
            self._orders.pop(run.order, None)

    def _leave(self, run: Running, poisoned: bool = False) -> None:
        self._running.remove(run)
        self.rows.give_back(_row(run), poisoned)
        run.row = None

    def _poisoned(self, run: Running) -> None:
        """这一行的数坏了：只有它的请求失败，行清零再给别人。请求已因另一段失败了就无事。"""
        if run.row is not None:
            order = self._orders[run.order]
            self._leave(run, poisoned=True)
            self._fail_all(order, "internal")


def _row(run: Running) -> int:
    assert run.row is not None
    return run.row

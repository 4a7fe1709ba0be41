"""一次评测：一份文本与几个任务，做到底或做到被打断；结果知道自己怎样写成 JSON、怎样说。"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Model

from .perplexity import (
    HeldOut,
    Perplexity,
    WindowScore,
    count_windows,
    score_windows,
    summarize,
)
from .scoring import Metric
from .tasks import ItemScore, Task, TaskResult, score_items, summarize_task

Meter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class TextScore:
    """文本上的结果；found 只含打过分的，total 是全部的词元数。"""

    held: HeldOut
    found: Perplexity
    total: int
    context_size: int
    stride: int

    @property
    def name(self) -> str:
        return self.held.name

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return self.found.metrics()

    def describe(self) -> str:
        found = self.found
        return (
            f"{_count(found.tokens, self.total, 'tokens')}, {found.bytes:,} bytes, "
            f"{found.windows:,} windows, stride {self.stride:,}"
        )

    def to_dict(self) -> dict[str, Any]:
        found = self.found
        return {
            "kind": "perplexity",
            "name": self.name,
            "sha256": self.held.identity,
            "documents": self.held.documents,
            "complete": found.tokens == self.total,
            "done": found.tokens,
            "total": self.total,
            "context_size": self.context_size,
            "stride": self.stride,
            "windows": found.windows,
            "windows_total": count_windows(self.total, self.context_size, self.stride),
            "tokens": found.tokens,
            "separators": found.separators,
            "bytes": found.bytes,
            "nats": found.nats,
            "metrics": _numbers(self.metrics),
        }


@dataclass(frozen=True)
class TaskScore:
    """一个任务的结果；found 只含做完的题。"""

    task: Task
    found: TaskResult

    @property
    def name(self) -> str:
        return str(self.task.path)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return self.found.metrics

    def describe(self) -> str:
        found = self.found
        cut = f", {found.cut:,} cut on the left to fit the context" if found.cut else ""
        return f"{self.task.kind}, {_count(found.items, len(self.task.items), 'items')}{cut}"

    def to_dict(self) -> dict[str, Any]:
        found, total = self.found, len(self.task.items)
        return {
            "kind": self.task.kind,
            "name": self.name,
            "sha256": self.task.sha256,
            "complete": found.items == total,
            "done": found.items,
            "total": total,
            "cut": found.cut,
            "metrics": _numbers(self.metrics),
        }


Score = TextScore | TaskScore


@dataclass(frozen=True)
class Outcome:
    """有了结果的各项，按要求的次序；interrupted 时是已做完的部分。"""

    scores: tuple[Score, ...]
    interrupted: bool
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """要做的事。"""

    model: GPT2Model
    tokenizer: Tokenizer
    stride: int
    batch_size: int
    held: HeldOut | None
    tasks: tuple[Task, ...]

    def run(self, meter: Meter) -> Outcome:
        """做到底，或做到 Ctrl-C 为止；meter(标签, 词元总数) 给出报进度的函数。"""
        done, start, interrupted = _Done(), time.perf_counter(), False
        try:
            self._fill(done, meter)
        except KeyboardInterrupt:
            interrupted = True
        return Outcome(tuple(self._scores(done)), interrupted, time.perf_counter() - start)

    def _fill(self, done: _Done, meter: Meter) -> None:
        if self.held is not None:
            source = self.held.source
            with meter(self.held.name, source.n_tokens) as advance:
                for batch in score_windows(
                    self.model,
                    self.tokenizer,
                    source,
                    stride=self.stride,
                    batch_size=self.batch_size,
                ):
                    done.windows.extend(batch)
                    advance(sum(score.tokens for score in batch))
        for task in self.tasks:
            mine: list[ItemScore] = []
            done.items.append(mine)
            with meter(str(task.path), task.tokens) as advance:
                for block in score_items(self.model, task.items, self.batch_size, advance):
                    mine.extend(block)

    def _scores(self, done: _Done) -> list[Score]:
        found: list[Score] = []
        if done.windows:
            assert self.held is not None
            size, total = self.model.config.context_size, self.held.source.n_tokens
            found.append(TextScore(self.held, summarize(done.windows), total, size, self.stride))
        begun = zip(self.tasks, done.items, strict=False)
        found += [TaskScore(task, summarize_task(task, mine)) for task, mine in begun if mine]
        return found


@dataclass
class _Done:
    """已打的分：整批地接上去，所以何时被打断都前后一致。"""

    windows: list[WindowScore] = field(default_factory=list)
    items: list[list[ItemScore]] = field(default_factory=list)


def mean_nats(
    model: GPT2Model, tokenizer: Tokenizer, held: HeldOut, batch_size: int, meter: Meter
) -> float:
    """held 上每词元的 nat，步长半个上下文。"""
    stride = max(1, model.config.context_size // 2)
    scores: list[WindowScore] = []
    with meter(held.name, held.source.n_tokens) as advance:
        for batch in score_windows(
            model, tokenizer, held.source, stride=stride, batch_size=batch_size
        ):
            scores.extend(batch)
            advance(sum(score.tokens for score in batch))
    found = summarize(scores)
    return found.nats / found.tokens


def _count(done: int, total: int, unit: str) -> str:
    if done == total:
        return f"{done:,} {unit}"
    return f"partial, the first {done:,} {unit} of {total:,}"


def _numbers(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | None]]:
    """JSON 没有无穷大：写作 null。"""
    return {
        name: {"value": None if one.value == math.inf else one.value, "stderr": one.stderr}
        for name, one in metrics.items()
    }

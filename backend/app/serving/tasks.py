"""看里面的活：在两步之间一片一片地做，每轮至多占 max_stall。不知道 HTTP，也没有线程。

秒数不靠钟，靠开张时量的价目：n 个词元走完整个前向要 seconds(n)，一片只过其中一部分权重。
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch

from app.inspection.slices import Slice, forward_cost
from app.models.transformer import GPT2Config
from app.serving.schedule import Costs

Done = Callable[[Any, BaseException | None], object]


def price(costs: Costs, config: GPT2Config, piece: Slice) -> float:
    """一片要几秒。"""
    return costs.seconds(piece.tokens) * piece.weights / forward_cost(config)


def rows_within(costs: Costs, config: GPT2Config, weights: int, seconds: float, most: int) -> int:
    """seconds 秒里至多几个词元过得完 weights 个权重；至少一个。"""
    rows = most
    while rows > 1 and price(costs, config, Slice(rows, weights)) > seconds:
        rows = rows // 2
    return rows


class Task:
    """一件切成片的活。done(结果, 错误) 在引擎的线程里调用，要立刻返回；丢下的不叫。"""

    def __init__(
        self,
        steps: Generator[Slice, None, Any],
        priced: Callable[[Slice], float],
        done: Done,
    ) -> None:
        self._steps, self._priced, self._done = steps, priced, done
        self.price, self.ended = 0.0, False

    @torch.inference_mode()
    def advance(self) -> None:
        """做报过价的那一片，再给下一片报价。"""
        try:
            self.price = self._priced(next(self._steps))
        except StopIteration as end:
            self.ended = True
            self._done(end.value, None)
        except Exception as error:
            self.ended = True
            self._done(None, error)

    def drop(self, error: BaseException | None = None) -> None:
        """不要了；有 error 就说为什么。"""
        if not self.ended:
            self.ended = True
            self._steps.close()
            if error is not None:
                self._done(None, error)


class Tasks:
    """轮流做的几件；都由引擎的线程调用。"""

    def __init__(self) -> None:
        self._held: list[Task] = []

    @property
    def busy(self) -> bool:
        return bool(self._held)

    def add(self, task: Task) -> None:
        self._held.append(task)

    def drop_all(self, error: BaseException) -> None:
        for task in self._held:
            task.drop(error)
        self._held = []

    def run(self, seconds: float) -> float:
        """至多这么多秒的片；返回报的价之和。头一片总做，所以总会做完。"""
        spent = 0.0
        while self._held:
            task = self._held.pop(0)
            if task.ended:
                continue
            if spent and spent + task.price > seconds:
                self._held.insert(0, task)
                break
            spent += task.price
            task.advance()
            self._held.append(task)
        return spent

"""在 time_limit 之内收尾：先把学习率降下来，而不是停在高处。

降下来的那一段最见效（Hägele 2024, arXiv:2405.18392），所以按最后那一段时间（decay_fraction）提前
动手：到那时剩下的步数做不完，就从此刻的学习率用剩下的时间降到底。从哪一步起、一共几步记在状态里，
此后只看步数，所以续训与直跑逐位相同。
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ..config import TrainConfig
from ..optim.schedule import learning_rate, lowered

# 留给最后的验证与存盘。
_KEPT = 0.1


class Ending:
    """
    Attributes:
        last: 一共几步；时间不够时少于 config.steps。
    """

    def __init__(self, config: TrainConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._began, self._spent, self._first = clock(), 0.0, 0
        self._start: int | None = None
        self.last = config.steps

    @property
    def limited(self) -> bool:
        return self._config.seconds is not None

    @property
    def seconds(self) -> float:
        """用去的时间，从前的几次也算。"""
        return self._spent + self._clock() - self._began

    def plan(self, step: int) -> int | None:
        """做第 step 步（从 0 起）之前：该收尾就给出一共做几步；各 rank 照 rank 0 的。"""
        limit, done = self._config.seconds, step - self._first
        if limit is None or self._start is not None or done < 1:
            return None
        left, each = limit - self.seconds, (self._clock() - self._began) / done
        if left > limit * self._config.schedule.decay_fraction:
            return None
        able = max(1, int(left * (1 - _KEPT) / each))
        return None if step + able >= self._config.steps else step + able

    def begin(self, step: int, last: int) -> str:
        self._start, self.last = step, last
        return (
            f"time limit {self._config.time_limit}: from step {step + 1} on the learning rate goes "
            f"down to end at step {last} of {self._config.steps}"
        )

    def learning_rate(self, step: int, peak: float) -> float:
        schedule, start = self._config.schedule, self._start
        before = step if start is None else min(step, start)
        high = learning_rate(before, peak=peak, steps=self._config.steps, schedule=schedule)
        if start is None or step < start:
            return high
        done = (step - start + 1) / (self.last - start)
        return lowered(high, peak * schedule.min_lr_ratio, schedule.kind, done)

    def state(self) -> dict[str, Any]:
        """可写成 JSON；没有时限则空。"""
        if not self.limited:
            return {}
        plan = {"start": self._start, "last": self.last}
        return {"limit": self._config.seconds, "spent": self.seconds, **plan}

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """接上 state()；时限变了，就只记得用去了多少。"""
        self._first, self._began = step, self._clock()
        self._spent = state.get("spent", 0.0)
        if state.get("limit") == self._config.seconds and state.get("start") is not None:
            self._start, self.last = state["start"], state["last"]

"""引擎数着的，与近来每秒写几个词元：给人看的，不参与调度。"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# 看近来这么多秒：更短的跳得看不清，更长的停了也还在动。
_WINDOW = 2.0


@dataclass
class Counts:
    """从开张起数的；api 把它们写成 /metrics。"""

    prompt: int = 0
    made: int = 0
    asked: int = 0
    borrowed: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0
    last_step: float = 0.0


class Speed:
    """note 由引擎的线程调用，now 由谁都行。"""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=4096)

    def note(self, now: float, made: int) -> None:
        """走完一步，从开张起共写了 made 个。"""
        while len(self._steps) > 1 and now - self._steps[1][0] > _WINDOW:
            self._steps.popleft()
        self._steps.append((now, made))

    def now(self, now: float) -> float:
        steps = [step for step in list(self._steps) if now - step[0] <= _WINDOW]
        if len(steps) < 2:
            return 0.0
        (start, before), (_, after) = steps[0], steps[-1]
        return (after - before) / max(now - start, 1e-9)

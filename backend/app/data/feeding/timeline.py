"""哪一步读到第几行：每轮从整批开始，末一批可以不满；只由一个整数接续。"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Timeline:
    """rows: 每轮的行；size: 一批的行；做完 start 步时已读过 done 行。

    读过的行不算补足的，所以与批大小无关：中途换了批大小，也从同一行接着读。
    """

    rows: int
    size: int
    start: int = 0
    done: int = 0

    def at(self, step: int) -> int:
        """做完 step 步时读过几行。

        Raises:
            ValueError: 在接续的那一步之前。
        """
        if step < self.start:
            raise ValueError(f"step={step} comes before step {self.start}, where this feed goes on")
        epoch, place = divmod(self.done, self.rows)
        ahead, left = step - self.start, -(-(self.rows - place) // self.size)
        if ahead < left:
            return self.done + ahead * self.size
        more, within = divmod(ahead - left, self._steps)
        return (epoch + 1 + more) * self.rows + within * self.size

    def read(self, step: int) -> list[tuple[int, int]]:
        """第 step 批的各行：(轮次, 轮内第几行)。"""
        return [divmod(row, self.rows) for row in range(self.at(step), self.at(step + 1))]

    def steps_of(self, epochs: float) -> int:
        part, whole = math.modf(epochs)
        return int(whole) * self._steps + math.ceil(part * self.rows / self.size)

    def moved(self, step: int, done: int) -> Timeline:
        if done < 0:
            raise ValueError(f"windows={done} must not be negative")
        return replace(self, start=step, done=done)

    @property
    def _steps(self) -> int:
        return -(-self.rows // self.size)

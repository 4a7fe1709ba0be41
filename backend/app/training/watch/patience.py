"""提前结束：验证损失连着几次不再好转（Prechelt 1998, "Early Stopping - But When?"）。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """自己记着见过的最低的损失，不看 best.json：那里可能是别的尺子量的，也可能被删。

    同一步验证两遍（检查点是验证之前的状态，续训会再做一遍）只算一次。

    Args:
        limit: 连着几次没有更低就结束；0 = 从不。
        measured: 损失在什么上量的；换了尺子就从头数起。
        delta: 低这么多以上才算更低。
    """

    def __init__(self, limit: int, measured: Mapping[str, Any] | None, delta: float = 0.0) -> None:
        self._delta = delta
        self._limit, self._measured = limit, None if measured is None else dict(measured)
        self._lowest, self._at, self._last, self._stale = math.inf, 0, 0, 0

    def note(self, step: int, loss: float) -> None:
        """做完 step 步（从 1 起）之后的验证损失。"""
        if step <= self._last:
            return
        self._last = step
        if loss < self._lowest - self._delta:
            self._lowest, self._at, self._stale = loss, step, 0
        else:
            self._stale += 1

    @property
    def over(self) -> bool:
        return 0 < self._limit <= self._stale

    @property
    def said(self) -> str:
        return (
            f"ended early at step {self._last}: {self._stale} validations in a row without a loss "
            f"below {self._lowest:.4f} of step {self._at} (patience {self._limit})"
        )

    def state(self) -> dict[str, Any]:
        """可写成 JSON；还没有验证过则空。"""
        if not self._last:
            return {}
        counts = {"lowest": self._lowest, "at": self._at, "last": self._last, "stale": self._stale}
        return counts | {"measured": self._measured}

    def load(self, state: Mapping[str, Any]) -> None:
        """接上 state()；空的（早先的检查点没有这一份）或别的尺子量的，就是从头数起。"""
        if state.get("measured") != self._measured:
            state = {}
        self._lowest, self._at = state.get("lowest", math.inf), state.get("at", 0)
        self._last, self._stale = state.get("last", 0), state.get("stale", 0)

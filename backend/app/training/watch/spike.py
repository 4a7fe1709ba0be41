"""尖峰：损失或梯度范数高出最近各步的均值六倍标准差（OLMo-core 的 SkipStepOptimizer 的规矩）。

与它有三处不同：只看向上的一边；反常的步不进历史，否则一个尖峰会抬高门槛、放过下一个；
历史几乎不动时（停在平台上）标准差没有意义，所以另要高出均值的一个比例。
梯度范数在健康的训练里也大起大落（还会一路变小，标准差跟着变小），所以它要近乎均值的两倍，
并且高出这段历史里见过的最大值。
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

WINDOW = 128
NEEDED = WINDOW // 2
SIGMAS = 6.0
LEAST_RISE = 0.05
# 梯度范数另外要高出：均值与历史最大值的这么多倍；健康的训练里见过 1.83 与 1.52 倍。
NORM_RISE, OVER_HIGHEST = 0.9, 1.6
# 连续这么多步都反常，就不是尖峰，而是新的水平：忘掉历史，免得从此步步都跳过。
NEW_LEVEL = 10
_NORM = "gradient norm"


class SpikeWatch:
    """最近 128 个寻常步的损失与梯度范数。"""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {
            "loss": deque(maxlen=WINDOW),
            _NORM: deque(maxlen=WINDOW),
        }
        self._in_a_row = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """看一步（两个有限数）：寻常就记入历史并返回 None，反常就返回一句说明。"""
        values = {"loss": loss, _NORM: norm}
        reasons = [line for name, value in values.items() if (line := self._above(name, value))]
        if reasons:
            self._in_a_row += 1
            if self._in_a_row >= NEW_LEVEL:
                self.load({})
            return " and ".join(reasons)
        self._in_a_row = 0
        for name, value in values.items():
            self._seen[name].append(value)
        return None

    def _above(self, name: str, value: float) -> str | None:
        seen = np.array(self._seen[name])
        if len(seen) < NEEDED:
            return None
        mean = float(seen.mean())
        limit = mean + max(SIGMAS * float(seen.std()), LEAST_RISE * mean)
        if name == _NORM:
            limit = max(limit, (1 + NORM_RISE) * mean, OVER_HIGHEST * float(seen.max()))
        if value <= limit:
            return None
        return f"{name} {value:.4g} is above {limit:.4g} (mean {mean:.4g} of {len(seen)} steps)"

    def state(self) -> dict[str, Any]:
        """可写成 JSON 的全部状态；浮点数原样往返。"""
        seen = {name: list(values) for name, values in self._seen.items()}
        return {"seen": seen, "in_a_row": self._in_a_row}

    def load(self, state: Mapping[str, Any]) -> None:
        """接上 state()；空的（早先的检查点没有这一份）就是从头看起。"""
        self._in_a_row = state.get("in_a_row", 0)
        for name, values in self._seen.items():
            values.clear()
            values.extend(state.get("seen", {}).get(name, ()))

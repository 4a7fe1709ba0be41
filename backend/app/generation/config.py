"""采样设置：不依赖 torch，命令行可以直接用它。"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from typing_extensions import Doc


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """从 logits 到下一个词元的全部设置；默认是原样按模型的分布采样。

    Raises:
        ValueError: 值越界，点名字段、值与范围。
    """

    temperature: Annotated[float, Doc("0 = greedy; below 1 = safer, above 1 = wilder")] = 1.0
    top_k: Annotated[int | None, Doc("keep the k most likely tokens")] = None
    top_p: Annotated[
        float | None, Doc("keep the smallest set of tokens with this much probability")
    ] = None
    min_p: Annotated[
        float | None, Doc("drop tokens below this fraction of the likeliest one's probability")
    ] = None
    repetition_penalty: Annotated[
        float, Doc("above 1 makes tokens seen in prompt or text less likely (CTRL)")
    ] = 1.0

    def __post_init__(self) -> None:
        self._number("temperature", 0.0, math.inf, "0 (greedy) or a positive number such as 0.8")
        self._number("repetition_penalty", 0.0, math.inf, "a positive number, 1 = off")
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty=0 must be a positive number, 1 = off")
        if self.top_p is not None:
            self._number("top_p", 0.0, 1.0, "in (0, 1], None = off")
            if self.top_p == 0:
                raise ValueError("top_p=0 must be in (0, 1]; for greedy use temperature=0")
        if self.min_p is not None:
            self._number("min_p", 0.0, 1.0, "in [0, 1], None = off")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k={self.top_k!r} must be an integer of at least 1, None = off")

    def _number(self, name: str, low: float, high: float, wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}={value!r} must be {wanted}")
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

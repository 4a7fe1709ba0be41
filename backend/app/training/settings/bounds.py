"""配置里的数的界限。"""

from __future__ import annotations

from typing import Any


def between(config: Any, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """
    Raises:
        ValueError: config.name 不在 [low, high]（open_low：(low, high]）之内。
    """
    value = getattr(config, name)
    if not low <= value <= high or (open_low and value == low):
        bound = f"above {low}" if open_low else f"at least {low}"
        raise ValueError(
            f"{name}={value} must be {bound}" + (f" and at most {high}" if high < 1e12 else "")
        )

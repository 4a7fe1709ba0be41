"""学习率：步数的纯函数，所以续训不必保存它的状态。"""

from __future__ import annotations

import math

from ..config import ScheduleConfig


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """第 step 步（从 0 起）的学习率；第一步不为零，最后一步恰为 peak·min_lr_ratio。

    预热之后：cosine 与 linear 一路降到底；wsd 先守住峰值，最后一段才降，降法是
    1 - sqrt（Hägele 2024, arXiv:2405.18392：胜过直线），所以守住的一段可以随时接着训。
    """
    warmup, last = schedule.warmup_steps, steps - 1
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    start = max(warmup, last - schedule.decay_steps(steps)) if schedule.kind == "wsd" else warmup
    done = min(1.0, max(0, step - start) / max(1, last - start))
    return lowered(peak, peak * schedule.min_lr_ratio, schedule.kind, done)


def lowered(high: float, low: float, kind: str, done: float) -> float:
    """从 high 往 low 降了 done（0 到 1）时。"""
    return low + (high - low) * _left(kind, done)


def _left(kind: str, done: float) -> float:
    """降了 done（0 到 1）时还剩几成。"""
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - (math.sqrt(done) if kind == "wsd" else done)

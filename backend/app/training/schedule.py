"""学习率：步数的纯函数，所以续训不必保存它的状态。"""

from __future__ import annotations

import math

from .config import ScheduleConfig


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """第 step 步（从 0 起）的学习率；第一步不为零，最后一步恰为 peak·min_lr_ratio。"""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    lowest = peak * schedule.min_lr_ratio
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * done))

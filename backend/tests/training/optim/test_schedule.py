"""学习率的三种降法：两端、各段的单调、接缝。"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.training.config import Decay, ScheduleConfig, TrainConfig
from app.training.optim.schedule import learning_rate

KINDS: list[Decay] = ["cosine", "linear", "wsd"]


def rates(steps: int, schedule: ScheduleConfig, peak: float = 1.0) -> np.ndarray:
    return np.array(
        [learning_rate(s, peak=peak, steps=steps, schedule=schedule) for s in range(steps)]
    )


@given(
    st.sampled_from(KINDS),
    st.integers(3, 400),
    st.integers(0, 100),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_ends_pieces_and_joints(
    kind: Decay, steps: int, warmup: int, lowest: float, fraction: float
) -> None:
    schedule = ScheduleConfig(
        kind=kind, warmup_steps=warmup, min_lr_ratio=lowest, decay_fraction=fraction
    )
    decay = schedule.decay_steps(steps) if kind == "wsd" else steps - 1 - warmup
    assume(decay >= 1 and warmup + decay < steps)
    if kind == "wsd":
        TrainConfig(steps=steps, schedule=schedule)
    curve, start = rates(steps, schedule), steps - 1 - decay
    # 两端：第一步不为零，峰值恰为 1，最后恰为最低。
    assert curve[0] == pytest.approx(1 / (warmup + 1)) and curve.max() == 1.0
    assert curve[-1] == pytest.approx(lowest, abs=1e-12)
    # 各段：升，平，降。
    assert (np.diff(curve[: warmup + 1]) > 0).all()
    assert (curve[warmup : start + 1] == 1.0).all()
    assert (np.diff(curve[start:]) <= 0).all()
    # 接缝：升不跳过一级，降的第一步不超过这一段最陡的坡。
    assert np.abs(np.diff(curve[: warmup + 1])).max(initial=0) <= 1 / (warmup + 1) + 1e-12
    steepest = {"cosine": math.pi / 2 / decay, "linear": 1 / decay, "wsd": decay**-0.5}[kind]
    assert -np.diff(curve[start:]).min() <= (1 - lowest) * steepest + 1e-12


def test_known_points() -> None:
    plain = {"warmup_steps": 0, "min_lr_ratio": 0.0}
    assert rates(101, ScheduleConfig(kind="linear", **plain), 2.0)[25] == pytest.approx(1.5)
    wsd = rates(101, ScheduleConfig(kind="wsd", decay_fraction=0.4, **plain))
    # 101 步的四成是 40 步，从第 60 步起；走过四分之一时剩一半。
    assert wsd[60] == 1.0 and wsd[61] < 1.0
    assert wsd[70] == pytest.approx(0.5) and wsd[100] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_past_the_end_it_stays_at_the_lowest(kind: Decay) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=2, min_lr_ratio=0.1)
    assert learning_rate(99, peak=1.0, steps=20, schedule=schedule) == pytest.approx(0.1)


def test_the_stable_part_does_not_know_the_end() -> None:
    """wsd 的用处：平稳段里的步与总步数无关，可以从那里接着训得更久。"""
    schedule = ScheduleConfig(kind="wsd", warmup_steps=5)
    short, long = rates(100, schedule), rates(1000, schedule)
    assert (short[:80] == long[:80]).all() and short[90] < long[90]

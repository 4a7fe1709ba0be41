"""健康的训练里一声误报也没有，而种下的尖峰照样看得见。

healthy_runs.json：各次训练每一步的损失与梯度范数（quickstart 的配方缩小了宽与层、字符级莎士比亚、
keel、post、deepnorm、Muon、专家、RoPE 等），四位有效数字。
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app.training.watch.spike import NEEDED, NORM_RISE, OVER_HIGHEST, WINDOW, SpikeWatch

RUNS = json.loads((Path(__file__).parent / "healthy_runs.json").read_text())


def watched(name: str) -> tuple[list[str], float, float]:
    """(误报, 每隔五步种一个大尖峰时看见的比例：损失三倍, 梯度范数十倍)。"""
    watch, alarms, seen = SpikeWatch(), [], []
    steps = list(zip(RUNS[name]["loss"], RUNS[name]["grad_norm"], strict=True))
    for number, (loss, norm) in enumerate(steps):
        # 头一个窗口里还有开训时的大数：尖峰在那之后才看得清。
        if number >= 2 * WINDOW and number % 5 == 0:
            planted = []
            for values in ((3 * loss, norm), (loss, 10 * norm)):
                other = SpikeWatch()
                other.load(watch.state())
                planted.append(other.judge(*values) is not None)
            seen.append(planted)
        if reason := watch.judge(loss, norm):
            alarms.append(f"step {number + 1}: {reason}")
    found = np.mean(seen, axis=0)
    return alarms, float(found[0]), float(found[1])


@pytest.mark.parametrize("name", RUNS)
def test_no_false_alarm_and_no_missed_spike(name: str) -> None:
    alarms, loss, norm = watched(name)
    assert alarms == []
    assert (loss, norm) == (1.0, 1.0)


def test_enough_runs_and_the_margins_that_were_seen() -> None:
    """至少十次；spike.py 的注释里的两个数就是其中最大的。"""
    assert len(RUNS) >= 10 and all(len(run["loss"]) >= 300 for run in RUNS.values())
    to_mean, to_highest = [], []
    for run in RUNS.values():
        norms = np.array(run["grad_norm"])
        for at in range(NEEDED, len(norms)):
            seen = norms[max(0, at - WINDOW) : at]
            if norms[at] > seen.mean() + 6 * seen.std():
                to_mean.append(norms[at] / seen.mean())
                to_highest.append(norms[at] / seen.max())
    # 只看六倍标准差之外的：它们原本是误报。
    assert (round(max(to_mean), 2), round(max(to_highest), 2)) == (1.83, 1.52)
    assert max(to_mean) < 1 + NORM_RISE and max(to_highest) < OVER_HIGHEST


def test_the_false_alarm_of_a_decaying_series_is_gone() -> None:
    """梯度范数一路变小、标准差也小时，略高出来的一步（1.45，界在 1.42）不是尖峰。"""
    watch = SpikeWatch()
    for step in range(WINDOW):
        wave = 0.03 * (-1) ** step
        assert watch.judge(5.0 - 0.01 * step, 1.25 - 0.0003 * step + wave) is None
    seen = np.array(watch.state()["seen"]["gradient norm"])
    assert 1.40 < seen.mean() + 6 * seen.std() < 1.45
    assert watch.judge(3.7, 1.45) is None and watch.judge(3.7, 2.9) is not None

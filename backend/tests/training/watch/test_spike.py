"""尖峰：六倍标准差的规矩，历史的存取，训练里的三种策略（C7）。"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from app.training import engine as engine_module
from app.training import trainer as trainer_module
from app.training.saving.checkpoint import step_folder
from app.training.step import Sums
from app.training.watch.spike import LEAST_RISE, NEEDED, NEW_LEVEL, SIGMAS, WINDOW, SpikeWatch

from ..conftest import Make, rows, same_weights, train

# 平的损失，便于注入；第 STEP 步是尖峰。
STEPS, STEP = 90, 80


def calm(steps: int = WINDOW, seed: int = 0) -> SpikeWatch:
    watch, source = SpikeWatch(), random.Random(seed)
    for _ in range(steps):
        assert watch.judge(3.0 + source.gauss(0, 0.1), 1.0 + source.gauss(0, 0.05)) is None
    return watch


@pytest.mark.parametrize(("loss", "norm", "named"), [(4.0, 1.0, "loss"), (3.0, 2.0, "norm")])
def test_above_six_sigma_is_a_spike(loss: float, norm: float, named: str) -> None:
    """均值 3、标准差 0.1：3.4 寻常，4.0 反常；梯度范数同理；向下的不算。"""
    watch = calm()
    assert watch.judge(3.4, 1.2) is None and watch.judge(0.1, 0.01) is None
    reason = calm().judge(loss, norm)
    assert reason is not None and named in reason and " and " not in reason
    assert SIGMAS == 6.0 and WINDOW == 128 and LEAST_RISE == 0.05


def test_needs_half_a_window() -> None:
    assert calm(NEEDED - 1).judge(300.0, 100.0) is None
    assert calm(NEEDED).judge(300.0, 100.0) is not None


def test_a_spike_does_not_hide_the_next() -> None:
    watch = calm()
    assert watch.judge(300.0, 1.0) and watch.judge(4.0, 1.0) and not watch.judge(3.1, 1.0)


def test_a_flat_history_is_not_touchy() -> None:
    watch = SpikeWatch()
    assert not any(watch.judge(3.0, 1.0) for _ in range(WINDOW))
    assert not watch.judge(3.14, 1.04) and watch.judge(3.16, 1.0)


def test_a_lasting_change_becomes_the_new_level() -> None:
    watch = calm()
    seen = [watch.judge(6.0, 1.0) is not None for _ in range(3 * WINDOW)]
    assert seen == [True] * NEW_LEVEL + [False] * (3 * WINDOW - NEW_LEVEL)


def test_only_the_last_window_counts() -> None:
    watch = calm()
    for _ in range(WINDOW):
        watch.judge(1.0, 1.0)
    assert watch.judge(3.0, 1.0) is not None


def test_state_goes_through_json_exactly() -> None:
    watch = calm(100, seed=3)
    watch.judge(300.0, 1.0)
    again = SpikeWatch()
    again.load(json.loads(json.dumps(watch.state())))
    assert again.state() == watch.state() and watch.state()["in_a_row"] == 1
    source = random.Random(5)
    for _ in range(400):
        loss, norm = source.gauss(3, 0.3), source.gauss(1, 0.2)
        assert again.judge(loss, norm) == watch.judge(loss, norm)
    again.load({})
    assert again.state() == SpikeWatch().state()


# ---- 训练里 ----


def inject(patch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """第 step 步（从 1 起）的损失或梯度乘以一百。"""
    real, plain = engine_module.accumulate, trainer_module.Trainer._train_step
    now = [0]

    def train_step(self: Any) -> None:
        now[0] = self.step + 1
        plain(self)

    def accumulate(model: Any, *args: Any) -> Sums:
        sums = real(model, *args)
        if now[0] != step:
            return sums
        if what == "loss":
            return sums._replace(loss=sums.loss * 100)
        for p in model.parameters():
            p.grad.mul_(100)
        return sums

    patch.setattr(trainer_module.Trainer, "_train_step", train_step)
    patch.setattr(engine_module, "accumulate", accumulate)


@pytest.fixture
def long(make: Make, tmp_path: Path) -> Any:
    def build(name: str, **changes: Any) -> Any:
        return make(**({"out": str(tmp_path / name), "steps": STEPS} | changes))

    return build


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_policies_at_a_spike(long: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """C7：warn 只说，权重与 off 的逐位相同；skip 那一步不更新，计数，记下是哪几行。"""
    train(long("calm", steps=STEP - 2))
    start = str(step_folder(Path(long("calm").out), STEP - 2))
    inject(monkeypatch, STEP, what)
    lines: list[str] = []
    monkeypatch.setattr(trainer_module.Progress, "tell", lambda self, text: lines.append(text))
    results, told = {}, {}
    for policy in ("off", "warn", "skip"):
        steps = {"steps": STEP + 2, "save_every": 1, "keep_last": 9}
        results[policy] = train(long(policy, spike=policy, resume=start, **steps))
        told[policy] = [line for line in lines if "is a spike" in line]
        lines.clear()
    assert told["off"] == [] and len(told["warn"]) == len(told["skip"]) == 1
    assert f"step {STEP} is a spike: " in told["warn"][0] and "no update" in told["skip"][0]
    assert same_weights(results["off"].checkpoint, results["warn"].checkpoint)
    assert [results[p].skipped for p in results] == [0, 0, 1]
    for policy, kind in (("warn", "spike"), ("skip", "skipped")):
        found = rows(long(policy).out, kind)
        assert [row["step"] for row in found] == [STEP] and len(found[0]["rows"]) == 4
        assert what in found[0]["where"]
    run = Path(long("skip").out)
    for name in ("model.safetensors", "optim.safetensors"):
        before, after = ((step_folder(run, s) / name).read_bytes() for s in (STEP - 1, STEP))
        assert before == after
    assert not same_weights(step_folder(run, STEP), step_folder(run, STEP + 1))


def test_without_a_spike_no_policy_matters(long: Any) -> None:
    """C7：没有尖峰时，三种策略的权重与损失逐位相同。"""
    results = {p: train(long(p, spike=p)) for p in ("off", "warn", "skip")}
    for policy in ("warn", "skip"):
        assert same_weights(results["off"].checkpoint, results[policy].checkpoint)
        assert results[policy].skipped == 0 and not rows(long(policy).out, "spike")


def test_history_survives_resume(long: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """尖峰之前停下再续：照样跳过同一步，权重逐位相等；历史丢了就不会跳过。"""
    inject(monkeypatch, STEP, "loss")
    whole = train(long("whole", spike="skip", save_every=STEP - 3, keep_last=9))
    source = str(step_folder(Path(long("whole").out), STEP - 3))
    resumed = train(long("resumed", spike="skip", resume=source))
    assert resumed.skipped == whole.skipped == 1
    assert same_weights(whole.checkpoint, resumed.checkpoint)
    monkeypatch.setattr(SpikeWatch, "load", lambda self, state: None)
    assert train(long("forgot", spike="skip", resume=source)).skipped == 0


def test_a_checkpoint_without_history_loads(long: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer_module.write_state

    def old(folder: Path, config: Any, facts: Any) -> None:
        real(folder, config, {k: v for k, v in facts.items() if k != "spikes"})

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "write_state", old)
        train(long("old", steps=6))
    assert train(long("old", steps=8, resume="auto")).step == 8

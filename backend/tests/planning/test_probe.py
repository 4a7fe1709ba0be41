"""试跑：外推的算术，子进程里真的量到的，失败时说清。没有一处看墙上的钟。"""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
from typing import Any

import pytest
import torch

from app.models.transformer import GPT2Config, GPT2Model
from app.planning import probe as probe_module
from app.planning.probe import Clock, Measured, ProbeFailed, extrapolate, probe, probe_layers
from app.training.config import TrainConfig

LINUX = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs"
)


def config(
    n_layer: int = 12, batch: int = 2, micro: int | None = None, **model: Any
) -> TrainConfig:
    shape = GPT2Config(
        vocab_size=64, context_size=16, n_head=2, n_embed=16, dropout=0.0, n_layer=n_layer, **model
    )
    return TrainConfig(
        model=shape, batch_size=batch, micro_batch=micro, device="cpu", precision="float32"
    )


def measured(layers: int, **changes: Any) -> Measured:
    """按一条直线造出的量度：early = 1000 + 300n，late = 2000 + 200n，每层 10 个参数。"""
    one = Measured(
        layers=layers, rows=2, parameters=100 + 10 * layers, steps=3, base=50,
        early=1000 + 300 * layers, late=2000 + 200 * layers, block=2.0, rest=5.0, update=1.0,
    )  # fmt: skip
    return dataclasses.replace(one, **changes)


def test_each_part_grows_with_its_own_measure() -> None:
    found = extrapolate([measured(1), measured(2)], config(12), 100 + 10 * 12)
    assert found.seconds == pytest.approx(12 * 2.0 + 5.0 + 1.0 * 220 / 120)
    assert (found.peak, found.base, found.layers, found.rows) == (1000 + 300 * 12, 50, 2, 2)


def test_the_larger_of_two_lines_counts_though_the_other_led_in_the_probe() -> None:
    """少层时峰值在反向的末尾，多层时在开头：只外推峰值会算少。"""
    small, large = measured(1), measured(2)
    assert all(one.late > one.early for one in (small, large))
    naive = large.late + (large.late - small.late) * 10
    found = extrapolate([small, large], config(12), 220)
    assert found.peak == 1000 + 300 * 12 > naive
    assert extrapolate([small, large], config(5), 150).peak == 2000 + 200 * 5


def test_passes_repeat_everything_but_the_update() -> None:
    found = extrapolate([measured(2)], config(2, batch=7, micro=2), 120)
    assert found.seconds == pytest.approx(3.5 * (2 * 2.0 + 5.0) + 1.0)
    assert found.peak == 2000 + 200 * 2


def test_fewer_sequences_than_the_micro_batch_say_nothing_of_memory() -> None:
    found = extrapolate([measured(2, rows=1)], config(2, batch=4), 120)
    assert found.peak is None and found.rows == 1
    assert found.seconds == pytest.approx(4 * (2 * 2.0 + 5.0) + 1.0)
    unseen = [measured(n, base=None, early=None, late=None) for n in (1, 2)]
    assert extrapolate(unseen, config(12), 220).peak is None


@pytest.mark.parametrize(
    ("n_layer", "pattern", "layers"),
    [
        (12, None, (1, 2)),
        (4, None, (4,)),
        (5, None, (1, 2)),
        (12, ("local(4)", "causal"), (2, 4)),
        (12, ("local(4)", "causal", "causal"), (3, 6)),
        (6, ("local(4)", "causal", "causal"), (6,)),
        (12, ("local(4)",) * 5 + ("causal",) * 7, (12,)),
    ],
)
def test_whole_cycles_of_patterns(n_layer: int, pattern: Any, layers: tuple[int, ...]) -> None:
    assert probe_layers(config(n_layer, attention_pattern=pattern)) == layers


class FakeClock(Clock):
    """走一下是一秒，峰值由试验给。"""

    def __init__(self, peaks: list[int]) -> None:
        super().__init__(torch.device("cpu"))
        self._seen, self._ticks, self._given = True, 0, peaks

    def mark(self) -> None:
        self._times.append(float(self._ticks))
        self._peaks.append(self._given[self._ticks])
        self._ticks += 1


@pytest.mark.parametrize("layers", [1, 3])
def test_marks_fall_between_the_blocks(layers: int) -> None:
    """n 层：开始、嵌入、末块、n + 1 个梯度、反向结束、更新结束，共 n + 6 个记号。"""
    clock = FakeClock(list(range(100, 100 + layers + 6)))
    model = GPT2Model(config(layers).model)
    clock.watch(model)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    clock.mark()
    model(ids, targets=ids)["loss"].backward()
    clock.mark()
    clock.mark()
    assert len(clock._times) == layers + 6
    clock.end_pass()
    # 前向的各块之间没有记号，算一段；反向每块一段；更新一段；其余是 4 段。
    assert (clock.blocks, clock.rests, clock.updates) == ([1.0 + layers], [3.0], [1.0])
    assert clock.early == 104
    assert clock.late == 100 + layers + 5


def test_the_last_block_decides_early_and_the_first_block_late() -> None:
    """6 层：记号 4 是反向过了末块；记号 9 过了首块。中间各块的峰值两头都不算。"""
    for place, early, late in ((4, 9, 1), (5, 1, 1), (8, 1, 1), (9, 1, 9), (11, 1, 9)):
        peaks = [1] * 12
        peaks[place] = 9
        clock = FakeClock(peaks)
        model = GPT2Model(config(6).model)
        clock.watch(model)
        ids = torch.zeros(1, 16, dtype=torch.int64)
        clock.mark()
        model(ids, targets=ids)["loss"].backward()
        clock.mark()
        clock.mark()
        clock.end_pass()
        assert (clock.early, clock.late) == (early, late), place


@LINUX
def test_the_peak_between_two_marks_is_seen_once() -> None:
    clock = Clock(torch.device("cpu"))
    clock._take_peak()
    before = clock.resident()
    assert before is not None
    # 直接向内核要页：malloc 可能给回早已常驻的空闲块，那样什么也没有增加。
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    first, second = clock._take_peak(), clock._take_peak()
    assert first - before > 60 * 2**20 > second - before


@pytest.mark.slow
def test_a_real_probe() -> None:
    """两个子进程；外推出的峰值装得下整个模型的权重、梯度与两个矩，又不比它们大多少。"""
    run = config(6, batch=3, micro=2)
    run = run.replace(model=run.model.replace(n_embed=256, vocab_size=4096))
    parameters = GPT2Model(run.model).num_parameters()
    found = probe(run, parameters, rows=2, limit=120)
    assert found.seconds > 0 and (found.layers, found.rows) == (2, 2)
    if os.access("/proc/self/clear_refs", os.W_OK):
        copies = 4 * 4 * parameters
        assert found.base is not None and found.base > 50 * 2**20
        assert found.peak is not None and 0.9 * copies < found.peak < 2 * copies


def test_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("probe", options["timeout"])

    monkeypatch.setattr(probe_module.subprocess, "run", slow)
    with pytest.raises(ProbeFailed, match="the probe of 1 layers took more than 7 s"):
        probe(config(), 100, rows=1, limit=7.0)

    def broken(code: int, text: str) -> Any:
        return lambda *args, **options: subprocess.CompletedProcess(args, code, "", text)

    monkeypatch.setattr(probe_module.subprocess, "run", broken(1, "Traceback\nMemoryError: 5 GiB"))
    with pytest.raises(ProbeFailed, match="failed: MemoryError: 5 GiB"):
        probe(config(), 100, rows=1, limit=7.0)
    monkeypatch.setattr(probe_module.subprocess, "run", broken(-9, ""))
    with pytest.raises(ProbeFailed, match="exit code -9, most likely out of memory"):
        probe(config(), 100, rows=1, limit=7.0)

"""短短地试跑几步：一步多久、峰值内存多少。在另一个进程里，模型只留一两轮图样那么多层。

宽度、批、上下文都是真的，所以每层的花费是量出来的，不是推算的。峰值出现在两处之一：反向走过
最上一层时（激活都在），或走过最下一层直到更新完（梯度都在）；两处各自随层数线性地长，所以分别
量、分别外推，再取大的。时间按块记：块的时间乘层数，更新的时间按参数量，其余不变。
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from app.common.memory import resident_memory, resident_peak
from app.data.batch import Batch
from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import TrainConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.machine.runtime import Runtime, choose_runtime
from app.training.optim.build import build_optimizer
from app.training.step import accumulate, clip_gradients, gradient_norm

# 层数不多就整个量，不外推。
_WHOLE = 4
_LEAST_STEPS, _MOST_STEPS, _ENOUGH_SECONDS = 3, 50, 3.0
_RESET = Path("/proc/self/clear_refs")


class ProbeFailed(ValueError):
    """试跑没有跑完。"""


@dataclass(frozen=True)
class Measured:
    """layers 层的模型，一次前向 rows 条序列。

    Attributes:
        base: 建模型之前程序本身占的字节数；None = 这个系统上量不到。
        early, late: 在 base 之上的峰值，两处（见本文件开头）。
        block: 一层的一次前向与反向，秒。
        rest: 一次前向与反向里块以外的（嵌入、输出头、损失），秒。
        update: 梯度范数、裁剪、优化器，秒。
    """

    layers: int
    rows: int
    parameters: int
    steps: int
    base: int | None
    early: int | None
    late: int | None
    block: float
    rest: float
    update: float


@dataclass(frozen=True)
class Estimate:
    """整个模型的一步。

    Attributes:
        seconds: 一步（全部前向、反向与一次更新）。
        peak: 在 base 之上的峰值字节数；None = 没有量（系统上量不到，或只量了一部分序列）。
        base: 程序本身占的。
        layers, rows: 实际量的最多层数与序列数。
    """

    seconds: float
    peak: int | None
    base: int | None
    layers: int
    rows: int


def probe_layers(config: TrainConfig) -> tuple[int, ...]:
    """量几层的模型：图样、重算与 MoE 层的一轮与两轮；层数不比那更多就只量整个模型。"""
    cycle = len(dict.fromkeys(config.model.patterns))
    given = config.model.attention_pattern
    if isinstance(given, tuple):
        cycle = len(given)
    cycle = math.lcm(cycle, max(1, config.activation_checkpointing), config.model.moe.every)
    if config.model.n_layer <= max(_WHOLE, 2 * cycle):
        return (config.model.n_layer,)
    return cycle, 2 * cycle


def few_layers(model: GPT2Config, layers: int) -> GPT2Config:
    """layers 层的模型。MoE 层不是等距的，就每层都是：运算量相近，内存只会估多。"""
    if layers == model.n_layer or not (model.moe.layers or model.moe.first_dense):
        return model.replace(n_layer=layers)
    return model.with_layers(layers, range(layers))


def probe(config: TrainConfig, parameters: int, *, rows: int, limit: float) -> Estimate:
    """试跑并外推到整个模型。

    Args:
        parameters: 整个模型的参数量。
        rows: 一次前向几条序列；少于微批时时间按序列数放大，内存不外推。
        limit: 每个进程至多几秒。

    Raises:
        ProbeFailed: 超时、内存不够或出错；信息里有原因。
    """
    found = [_run(config, layers, rows, limit) for layers in probe_layers(config)]
    return extrapolate(found, config, parameters)


def extrapolate(found: Sequence[Measured], config: TrainConfig, parameters: int) -> Estimate:
    """found 按层数从少到多；最后一个给出时间，两个一起给出内存的斜率。"""
    last, layers = found[-1], config.model.n_layer
    # 最后一个微批可以不满，所以按序列数而不按次数算。
    passes = config.batch_size / last.rows
    seconds = passes * (layers * last.block + last.rest)
    seconds += last.update * parameters / last.parameters
    peak = None
    if last.rows == config.rows_at_once:
        ends = [_line(found, kind, layers) for kind in ("early", "late")]
        peak = None if None in ends else max(end for end in ends if end is not None)
    return Estimate(seconds, peak, last.base, last.layers, last.rows)


def _line(found: Sequence[Measured], kind: str, layers: int) -> int | None:
    """过两点的直线在 layers 处的值；只有一点时就是它。"""
    values = [getattr(one, kind) for one in found]
    if None in values:
        return None
    if len(found) == 1:
        return values[0]
    (a, b), span = values, found[1].layers - found[0].layers
    return round(b + (b - a) * (layers - found[1].layers) / span)


def _run(config: TrainConfig, layers: int, rows: int, limit: float) -> Measured:
    order = {"config": config.to_dict(), "layers": layers, "rows": rows}
    # 与 gpt2 train 相同；见那里的理由。
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "app.planning.probe"],
            cwd=Path(__file__).parents[2],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"the probe of {layers} layers took more than {limit:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"exit code {done.returncode}, most likely out of memory"
        raise ProbeFailed(f"the probe of {layers} layers failed: {why}")
    return Measured(**json.loads(done.stdout))


def _main() -> None:
    """子进程：从标准输入读要量什么，往标准输出写一行结果。"""
    order = json.load(sys.stdin)
    config = TrainConfig.from_dict(order["config"])
    print(json.dumps(asdict(_measure(config, order["layers"], order["rows"]))))


def _measure(config: TrainConfig, layers: int, rows: int) -> Measured:
    runtime = choose_runtime(config)
    clock = Clock(runtime.device)
    _touch_everything(config, runtime)
    base = clock.resident()
    model = GPT2Model(few_layers(config.model, layers)).to(runtime.device).train()
    checkpoint_blocks(model, config.recomputed_layers)
    optimizer, _ = build_optimizer(model, config.optim)
    clock.watch(model)
    # 从第二次前向起梯度已经在了，第三次起就与第二次一样。
    passes = min(2, config.passes)

    def step() -> None:
        for index in range(passes):
            _forward_and_backward(model, config, rows, runtime, clock)
            if index == passes - 1:
                _update(model, optimizer, config, clock)
            clock.end_pass()

    # 第一步还要建优化器的状态，不计时；它的内存不比后面的多。
    step()
    clock.forget_times()
    begin, steps = time.perf_counter(), 0
    while steps < _LEAST_STEPS or (
        steps < _MOST_STEPS and time.perf_counter() - begin < _ENOUGH_SECONDS
    ):
        step()
        steps += 1
    return Measured(
        layers=layers,
        rows=rows,
        parameters=model.num_parameters(),
        steps=steps,
        base=base,
        early=None if base is None else clock.early - base,
        late=None if base is None else clock.late - base,
        block=statistics.median(clock.blocks) / layers,
        rest=statistics.median(clock.rests),
        update=statistics.median(clock.updates),
    )


def _touch_everything(config: TrainConfig, runtime: Runtime) -> None:
    """训练一个极小的模型一步：torch 用到才装入的代码是程序本身的，不算在模型的账上。"""
    tiny = GPT2Config(vocab_size=64, context_size=8, n_layer=1, n_head=1, n_embed=16)
    model = GPT2Model(tiny).to(runtime.device).train()
    optimizer, _ = build_optimizer(model, config.optim)
    ids = np.zeros((1, 8), dtype=np.int64)
    accumulate(model, Batch(ids, ids), 1, runtime)
    optimizer.step()


def _forward_and_backward(
    model: GPT2Model, config: TrainConfig, rows: int, runtime: Runtime, clock: Clock
) -> None:
    shape = (rows, config.model.context_size)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    clock.mark()
    accumulate(model, Batch(ids, ids), rows, runtime)
    clock.mark()


def _update(
    model: GPT2Model, optimizer: torch.optim.Optimizer, config: TrainConfig, clock: Clock
) -> None:
    """与训练循环里的一样：范数、裁剪、更新、清零。"""
    parameters = list(model.parameters())
    norm = gradient_norm(parameters)
    clip_gradients(parameters, norm, norm.item(), config.optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clock.mark()


class Clock:
    """在嵌入、各块的前向与反向的边界上记时间与那一段的峰值。

    一次前向与反向的记号依次是：开始、嵌入之后、末块之后、各块输出的梯度（从上到下）、
    嵌入输出的梯度、反向结束、（有更新时）更新结束。
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.early = self.late = 0
        self.forget_times()
        self._times: list[float] = []
        self._peaks: list[int] = []
        self._layers = 0
        self._seen = self.resident() is not None

    def forget_times(self) -> None:
        self.blocks: list[float] = []
        self.rests: list[float] = []
        self.updates: list[float] = []

    def watch(self, model: GPT2Model) -> None:
        blocks = list(model.h.values())
        self._layers = len(blocks)
        model.embed.register_forward_hook(lambda *given: self._mark_both(given[-1]))
        for block in blocks[:-1]:
            block.register_forward_hook(lambda *given: self._mark_gradient(given[-1]))
        blocks[-1].register_forward_hook(lambda *given: self._mark_both(given[-1]))

    def mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._times.append(time.perf_counter())
        if self._seen:
            self._peaks.append(self._take_peak())

    def end_pass(self) -> None:
        """把这一次的记号归到各项。"""
        begin, embedded, forward, top, *rest = self._times
        *_, bottom = rest[: self._layers]
        end, *updated = rest[self._layers :]
        block = (forward - embedded) + (bottom - top)
        self.blocks.append(block)
        self.rests.append(end - begin - block)
        self.updates += [one - end for one in updated]
        if self._seen:
            # 每一段在它的记号处结束；第一段是两次之间的，不算。
            _, embedded_peak, forward_peak, top_peak, *later = self._peaks
            self.early = max(self.early, embedded_peak, forward_peak, top_peak, later[0])
            self.late = max(self.late, *later[self._layers - 1 :])
        self._times, self._peaks = [], []

    def resident(self) -> int | None:
        """此刻占的字节数；None = 量不到。"""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if self.device.type != "cpu" or not os.access(_RESET, os.W_OK):
            return None
        return resident_memory()

    def _take_peak(self) -> int:
        """上一个记号以来的峰值。"""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        highest = resident_peak()
        assert highest is not None
        # 5 = 只把 VmHWM 归到此刻的 VmRSS（proc(5)）。
        _RESET.write_text("5")
        return highest

    def _mark_both(self, x: torch.Tensor) -> None:
        self.mark()
        self._mark_gradient(x)

    def _mark_gradient(self, x: torch.Tensor) -> None:
        x.register_hook(lambda gradient: self.mark())


if __name__ == "__main__":
    _main()

"""开始之前：多久，多少内存。时间是在这个模型、这份数据上试走一行量的，冻结什么就省什么。"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from app.data.batch import Batch
from app.models.transformer import GPT2Model
from app.planning.fit import Room, refusal, training_footprint
from app.planning.tuned import Beside
from app.training.config import TrainConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.machine.runtime import Runtime, memory_error
from app.training.opened import Data, held_rows
from app.training.optim.build import build_optimizer
from app.training.step import accumulate, clip_gradients, gradient_norm


@dataclass(frozen=True)
class Times:
    """秒：一步，一次验证。"""

    step: float
    validation: float

    def whole(self, config: TrainConfig) -> float:
        evals = 1 + (config.steps // config.eval_every if config.eval_every else 0)
        return config.steps * self.step + evals * self.validation


def fits(config: TrainConfig, runtime: Runtime, beside: Beside, room: Room) -> bool:
    needed = room.needs(training_footprint(config, runtime, beside))
    return room.available is None or needed <= room.available


def check_room(config: TrainConfig, runtime: Runtime, beside: Beside, room: Room) -> None:
    """
    Raises:
        ValueError: 放不下，连同放得下的设置。
    """
    refused = refusal(config, room, lambda one: training_footprint(one, runtime, beside))
    if refused is not None:
        raise ValueError(f"{refused} (with --set here, as in --set micro_batch=1)")


def measure(model: GPT2Model, config: TrainConfig, runtime: Runtime, data: Data) -> Times:
    """一行走两遍，量第二遍；model 已冻结好，它的权重会被动过。

    Raises:
        MemoryError: 放不下。
    """
    rows = 2 if config.objective.kind == "dpo" else 1
    batch = data.feed.batch(0, slice(0, rows))
    with memory_error(config, rows):
        model.to(runtime.device).train()
        checkpoint_blocks(model, config.recomputed_layers)
        optimizer, _ = build_optimizer(model, config.optim)
        for _ in range(2):
            forward, update = _one(model, batch, optimizer, config, runtime)
        step = forward * config.batch_size / rows + update
        return Times(step, _validation(model, batch, config, runtime, data) / rows)


def _one(
    model: GPT2Model,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    runtime: Runtime,
) -> tuple[float, float]:
    begin = time.perf_counter()
    accumulate(model, batch, len(batch), runtime)
    _wait(runtime)
    middle = time.perf_counter()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = gradient_norm(trained)
    clip_gradients(trained, norm, norm.item(), config.optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait(runtime)
    return middle - begin, time.perf_counter() - middle


def _validation(
    model: GPT2Model, batch: Batch, config: TrainConfig, runtime: Runtime, data: Data
) -> float:
    """各验证集一遍：一行的前向乘行数。"""
    ids = torch.from_numpy(batch.inputs).to(runtime.device)
    begin = time.perf_counter()
    with torch.no_grad(), runtime.autocast():
        model.eval()(ids)
    _wait(runtime)
    groups = sum(held_rows(name, data, config).groups for name in data.val)
    return (time.perf_counter() - begin) * groups * config.rows_at_once


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)

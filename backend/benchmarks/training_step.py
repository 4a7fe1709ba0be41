"""一个配方的一步训练：几个配方在同一个进程里轮流走，比的是同一样东西。"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from app.data.batch import Batch
from app.models.transformer import GPT2Model
from app.training.config import TrainConfig
from app.training.machine.runtime import choose_runtime
from app.training.optim.build import build_optimizer
from app.training.step import accumulate


def stepper(config: TrainConfig) -> Callable[[], None]:
    """随机的词元，前向、反向、裁剪、更新。"""
    runtime = choose_runtime(config)
    model = GPT2Model(config.model).train()
    optimizer, _ = build_optimizer(model, config.optim)
    shape = (config.batch_size, config.model.context_size)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    batch = Batch(ids, ids)
    parameters = list(model.parameters())

    def step() -> None:
        accumulate(model, batch, config.batch_size, runtime)
        nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step

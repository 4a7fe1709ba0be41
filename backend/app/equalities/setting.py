"""核验时的一次小训练：同一批数，一边用用户的网格，一边一个进程，每个 rank 自己都算一遍。

B 批大小，T 词元数。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.data.batch import Batch
from app.distributed.mesh import Mesh
from app.models.transformer import GPT2Config, GPT2Model
from app.training.config import OptimConfig, TrainConfig
from app.training.engine import Plain
from app.training.engines import build_engine
from app.training.machine.runtime import Runtime
from app.training.optim.build import build_optimizer

STEPS = 3
_TOKENS = 16
_SEED = 7


class Trained(NamedTuple):
    """几步之后的整个的权重，各步的损失和范数，与梯度怎样相加。"""

    weights: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    summing: str


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        model: 缩小了的模型；config 里的并行是用户的。
    """

    config: TrainConfig
    mesh: Mesh
    device: torch.device

    @property
    def model(self) -> GPT2Config:
        return self.config.model

    def runtime(self) -> Runtime:
        return Runtime(self.device, "", torch.float32, "")

    def engine(self, mesh: Mesh, optim: OptimConfig, dtype: torch.dtype) -> Plain:
        torch.manual_seed(_SEED)
        model = GPT2Model(self.model).to(self.device, dtype).train()
        return build_engine(model, self.config.replace(optim=optim), self.runtime(), mesh)

    def train(
        self,
        mesh: Mesh,
        optim: OptimConfig,
        dtype: torch.dtype = torch.float32,
        steps: int = STEPS,
    ) -> Trained:
        """mesh 是用户的，或 Mesh()：一个进程。"""
        engine = self.engine(mesh, optim, dtype)
        optimizer, _ = build_optimizer(engine.model, optim)
        losses: list[float] = []
        norms: list[float] = []
        for step in range(steps):
            self.gradients(engine, step, losses)
            norm = engine.norm()
            norms.append(float(norm))
            engine.clip(norm, norms[-1])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return Trained(engine.whole_parameters(lambda p: p), losses, norms, engine.summing)

    def gradients(self, engine: Plain, step: int, losses: list[float]) -> dict[str, Tensor]:
        """整批的梯度，整个的。"""
        inputs, targets = self._batch(step)
        batch = Batch(inputs, targets).rows(engine.rows)
        losses.append(float(engine.gradients(batch, step).loss))
        return engine.whole_parameters(lambda p: p.grad)

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) 的输入与目标；有长短不一的 -100，也有一行一个目标也没有。"""
        random = np.random.default_rng([_SEED, step])
        length = min(_TOKENS, self.model.context_size)
        shape = (self.config.batch_size, length)
        inputs, targets = (random.integers(self.model.vocab_size, size=shape) for _ in range(2))
        for row, begin in enumerate(random.integers(length, size=len(targets))):
            targets[row, :begin] = -100
        targets[1] = -100
        return inputs, targets

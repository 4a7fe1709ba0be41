"""验证损失：固定的窗口，所以每次可比；不动训练的随机数。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.data.shards import TokenDataset
from app.distributed.comm import ALONE, Ranks
from app.models.transformer import GPT2Model

from ..machine.feeding import to_device
from ..machine.runtime import Runtime


def forward_loss(model: GPT2Model, x: Tensor, y: Tensor) -> Tensor:
    """整个的模型：每词元的平均损失。"""
    return model(x, targets=y)["loss"]


class Validation:
    """在验证集上均匀铺开的窗口，互不重叠。

    Args:
        windows: 至多用几个窗口；0 = 全部。
        rows: 一次前向几个窗口。
        ranks: 各组窗口轮流分给它们；相加的次序不变，所以几个 rank 都是同一个数。
        forward: (模型, (R, T) 的输入, 目标) -> 平均损失；切开的模型有自己的走法。
    """

    def __init__(
        self,
        data: TokenDataset,
        context: int,
        windows: int,
        rows: int,
        ranks: Ranks = ALONE,
        forward: Callable[[GPT2Model, Tensor, Tensor], Tensor] = forward_loss,
    ) -> None:
        if data.n_tokens < 2:
            raise ValueError(
                f"the validation data has {data.n_tokens} tokens, at least 2 are needed: "
                "prepare it again with a larger validation part"
            )
        self._data, self._rows, self._ranks, self._forward = data, rows, ranks, forward
        # 验证集比一个上下文还短时，就用它全部作一个短窗口。
        self._length = min(context, data.n_tokens - 1)
        possible = (data.n_tokens - 1) // self._length
        count = min(windows, possible) if windows else possible
        self._starts = np.arange(count) * possible // count * self._length

    @property
    def measured(self) -> dict[str, Any]:
        """在什么上量的：两次的这一项相同，损失才可以比。"""
        return {
            "data": self._data.fingerprint,
            "windows": len(self._starts),
            "context": self._length,
        }

    def loss(
        self, model: GPT2Model, runtime: Runtime, stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """每词元的平均交叉熵（nat）；中途要求停止则 None。"""
        groups = [
            self._starts[first : first + self._rows]
            for first in range(0, len(self._starts), self._rows)
        ]
        losses, counts, was_training = [], [], model.training
        model.eval()
        with torch.no_grad(), runtime.autocast():
            for first in range(0, len(groups), self._ranks.size):
                if stop():
                    break
                # 没有轮到的也算一组（不计）：切开的模型要大家一起前向。
                mine = min(first + self._ranks.rank, len(groups) - 1)
                losses.append(self._loss(model, runtime, groups[mine]))
                counts.append(len(groups[mine]))
        model.train(was_training)
        if len(losses) * self._ranks.size < len(groups):
            return None
        # 各组的损失留在设备上，到这里才等它一次。
        sums = torch.stack(losses).cpu().double() * torch.tensor(counts)
        found = self._ranks.gather(sums).T.flatten().tolist()[: len(groups)]
        return sum(found) / len(self._starts)

    def _loss(self, model: GPT2Model, runtime: Runtime, starts: np.ndarray) -> Tensor:
        """一组窗口的平均损失，标量，还在设备上。"""
        rows = [self._data.read(int(start), self._length + 1) for start in starts]
        batch = to_device(np.stack(rows), runtime.device)
        return self._forward(model, batch[:, :-1], batch[:, 1:])

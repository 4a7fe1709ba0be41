"""一种目标要说的三件事：一批里它数什么、损失怎样算、另外记下哪几个数。

B 行数、T 上下文长度。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from app.data.batch import UNSCORED, Batch
from app.models.transformer import GPT2Model
from app.models.transformer.model import GPT2Output, Head

from ..machine.feeding import to_device


class Rows(NamedTuple):
    """一个微批，已在设备上；各项的意思见 Batch。

    没有位置：模型由 segments 自己数（Positions.packed），那样它知道同一例里下标之差就是位置之差，
    分块的后端才可用。
    """

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None = None
    reference: Tensor | None = None
    mask: Tensor | None = None

    @property
    def places(self) -> dict[str, Tensor]:
        """哪里是哪一例、哪里是补齐，按 GPT2Model.forward 的名字；没有的不在内。"""
        given = {"segment_ids": self.segments, "attention_mask": self.mask}
        return {name: x for name, x in given.items() if x is not None}

    @classmethod
    def on(cls, batch: Batch, device: torch.device) -> Rows:
        def moved(x: np.ndarray | None) -> Tensor | None:
            return None if x is None else to_device(x, device)

        inputs, targets = moved(batch.inputs), moved(batch.targets)
        assert inputs is not None and targets is not None
        others = (batch.segments, batch.reference, batch.mask)
        return cls(inputs, targets, *map(moved, others))


# (模型, 一个微批, 怎样由头得到损失；None = 平均交叉熵) -> 模型的结果。切开的模型有自己的走法。
Forward = Callable[[GPT2Model, Rows, Head | None], GPT2Output]


def forward(model: GPT2Model, rows: Rows, head: Head | None = None) -> GPT2Output:
    """整个的模型。"""
    return model(rows.inputs, targets=rows.targets, head=head, **rows.places)


class Scored(NamedTuple):
    """一个微批的结果。

    Attributes:
        loss: 标量，带图；平均到 Objective.weight 所数的上。
        out: 模型的结果，均衡损失与负载在里面。
        numbers: (K,) 不带图，Objective.names 的各数，同样平均；没有则 None。
    """

    loss: Tensor
    out: GPT2Output
    numbers: Tensor | None = None


class Objective(Protocol):
    """微批的份额 = weight(微批) / weight(整批)；各微批的平均按份额相加，就是整批的平均。"""

    names: ClassVar[tuple[str, ...]]

    def weight(self, batch: Batch) -> int:
        """一批里数几个：计分的词元，或对。"""

    def score(self, model: GPT2Model, rows: Rows) -> Scored:
        """一个微批的前向；没有计分的就是 0，梯度也是 0。"""


def count_scored(targets: np.ndarray) -> int:
    return int(np.count_nonzero(targets != UNSCORED))

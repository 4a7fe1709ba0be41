"""DPO（Rafailov et al. 2023, arXiv:2305.18290）：-ln σ(β·((c - c₀) - (r - r₀)))。

c、r 是选中与落选的回答在模型下的对数概率（计分的词元之和，提示不算），带 ₀ 的是参考模型的，事先算好
（reference.py）。差为 0 时损失是 ln 2：模型与参考相同时正该如此。
选中的对数概率往下走是常事：损失只管差（落选的走得更低）。

B 行数 = 2 × 对数：第 2i 行是选中的，第 2i+1 行是落选的。T 上下文长度。
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from app.data.batch import UNSCORED, Batch
from app.models.transformer import GPT2Model
from app.models.transformer.layers.loss import token_losses

from .objective import Rows, Scored, forward


class Preference:
    """numbers：奖励差 β·(…) 的平均，差为正的占几成，两边的对数概率，选中的每词元交叉熵。"""

    names: ClassVar[tuple[str, ...]] = ("margin", "accuracy", "chosen", "rejected", "ce")

    def __init__(self, beta: float, sft: float) -> None:
        self._beta, self._sft = beta, sft

    def weight(self, batch: Batch) -> int:
        """两边都有计分的词元的对。"""
        scored = (batch.targets != UNSCORED).any(1).reshape(-1, 2)
        return int(scored.all(1).sum())

    def score(self, model: GPT2Model, rows: Rows) -> Scored:
        assert rows.reference is not None, "the feed has no reference"
        out = forward(model, rows, row_log_probs)
        logp = out["loss"]
        lengths = (rows.targets != UNSCORED).sum(1)
        real = (lengths > 0).view(-1, 2).all(1)
        chosen, rejected = logp.view(-1, 2).unbind(1)
        gained = (logp - rows.reference.to(logp.dtype)).view(-1, 2)
        margin = self._beta * (gained[:, 0] - gained[:, 1])
        # 选中的回答每词元的交叉熵，一对一份：长的不比短的重。
        ce = -chosen / lengths.view(-1, 2)[:, 0].clamp(min=1)
        each = -F.logsigmoid(margin) + self._sft * ce if self._sft else -F.logsigmoid(margin)
        columns = torch.stack([margin, (margin > 0).to(margin.dtype), chosen, rejected, ce])
        numbers = _mean(columns.detach(), real)
        return Scored(_mean(each[None], real)[0], out, numbers)


def row_log_probs(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """(V, C)、(B, T, C)、(B, T) -> 各行计分的词元的对数概率之和 (B,) float64。"""
    return -token_losses(hidden, weight, targets).double().sum(1)


def _mean(x: Tensor, real: Tensor) -> Tensor:
    """(K, B/2) -> (K,)：真的对的平均；一对也没有是 0。"""
    return (x * real).sum(1) / real.sum().clamp(min=1)

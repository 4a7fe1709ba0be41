"""词表切开的交叉熵：每块 logits 之后只传每行三个数，从不传 logits。

N 词元数、R 一块的行数、C 宽度、V 词表、W rank 数。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from app.models.transformer.layers.loss import IGNORE, row_chunks, wide_dtype

from ..comm import Ranks


def vocabulary_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ranks: Ranks
) -> Tensor:
    """平均交叉熵，各 rank 相同。hidden (B, T, C)、weight 是我的 (V/W, C)、targets (B, T)。

    hidden 的梯度只是我这部分词表的：由把 hidden 搬进来的那一步求和。
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    loss: Tensor = _Vocabulary.apply(flat, weight, labels, ranks)
    return loss


class _Vocabulary(torch.autograd.Function):
    """与 layers/loss.py 相同，前向里顺手把梯度也算好。"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ranks: Ranks) -> Tensor:
        kind = hidden.device.type
        computed = hidden.dtype
        if torch.is_autocast_enabled(kind):
            computed = torch.get_autocast_dtype(kind)
        h, w = hidden.to(computed), weight.to(computed)
        keep = labels != IGNORE
        count = keep.sum().clamp(min=1)
        share = (keep.to(hidden.dtype) / count)[:, None]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), dtype=wide_dtype(hidden.dtype), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for rows in row_chunks(labels, len(w)):
                loss, grad = _chunk(h[rows] @ w.t(), labels[rows], ranks)
                total += (loss * keep[rows]).sum()
                if not any(ctx.needs_input_grad):
                    continue
                grad = grad.to(computed)
                grad_hidden[rows] = (grad @ w).to(hidden.dtype)
                grad_weight += grad.t() @ (hidden[rows] * share[rows]).to(computed)
        ctx.save_for_backward(grad_hidden.mul_(share), grad_weight)
        return (total / count).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scales[0], grad_weight * scales[0], None, None


def _chunk(logits: Tensor, labels: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """我的 logits (R, V/W)、labels (R,) -> 交叉熵 (R,) 与 softmax - onehot (R, V/W)。"""
    logits = logits.to(wide_dtype(logits.dtype))
    local = labels - ranks.rank * logits.shape[1]
    inside = (local >= 0) & (local < logits.shape[1])
    index = local.masked_fill(~inside, 0)[:, None]
    highest = ranks.max(logits.amax(-1))
    logits.sub_(highest[:, None])
    target = logits.gather(1, index).squeeze(1).masked_fill(~inside, 0.0)
    grad = logits.exp_()
    total, target = ranks.sum(torch.stack([grad.sum(-1), target]))
    grad.div_(total[:, None])
    grad.scatter_add_(1, index, -inside[:, None].to(grad.dtype))
    return total.log() - target, grad

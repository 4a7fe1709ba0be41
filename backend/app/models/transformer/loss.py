"""输出头与交叉熵合在一起，按词元分块算：整张 (N, V) 的 logits 从不同时存在。

N 词元数（B·T）、R 一块的行数、C 宽度、V 词表。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import linear

IGNORE = -100
# 一块 logits 的上限：够大使矩阵乘吃满，又只占峰值内存的一小部分。
CHUNK_BYTES = 20 * 2**20


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """平均交叉熵，标量。hidden (B, T, C)、weight (V, C)、targets (B, T)，-100 不计。

    没有一个有效目标时为 0（梯度也为 0），不是 NaN。
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    return _ChunkedHead.apply(flat, weight, labels)


class _ChunkedHead(torch.autograd.Function):
    """前向里顺手把梯度也算好：共三次大矩阵乘，与不分块时相同；反向里重算 logits 则要四次。"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        h, w = _as_computed(hidden), _as_computed(weight)
        loss, *ctx.ready = _loss_and_gradients(h, w, labels, hidden, weight, ctx.needs_input_grad)
        ctx.computed = h.dtype
        ctx.save_for_backward(hidden, weight, labels)
        return loss.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # 交出仅有的一份引用，否则 .grad 会再复制一遍 (V, C)。retain_graph 的第二次反向才重算。
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            hidden, weight, labels = ctx.saved_tensors
            h, w = hidden.to(ctx.computed), weight.to(ctx.computed)
            _, *ready = _loss_and_gradients(h, w, labels, hidden, weight, ctx.needs_input_grad)
        grad_hidden, grad_weight = (None if g is None else g.mul_(scales[0]) for g in ready)
        return grad_hidden, grad_weight, None


def _loss_and_gradients(
    h: Tensor, w: Tensor, labels: Tensor, hidden: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """h、w 是换成计算精度的 hidden (N, C)、weight (V, C)；梯度仍用参数的精度累加。"""
    count = (labels != IGNORE).sum().clamp(min=1)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None
    total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(labels, weight.shape[0]):
            loss, grad = _chunk(linear(h[rows], w), labels[rows])
            total += loss
            if not (needs[0] or needs[1]):
                continue
            grad = grad.div_(count).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ w
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), h[rows])
    return total / count, grad_hidden, grad_weight


def _as_computed(x: Tensor) -> Tensor:
    """autocast 在 autograd.Function 里不缓存转换：在这里转一次，而不是每块一次。"""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    """半精度的 logits 升到 float32 再归约。"""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(labels: Tensor, vocab: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (vocab * 4))
    for start in range(0, labels.shape[0], size):
        yield slice(start, min(start + size, labels.shape[0]))


def _chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V)、(R,) -> 交叉熵之和（标量）与 softmax - onehot（忽略的行为 0）。就地改写 logits。"""
    logits = logits.to(_wide(logits.dtype))
    keep, index = labels != IGNORE, labels.clamp(min=0)[:, None]
    lse = logits.logsumexp(-1, keepdim=True)
    loss = ((lse - logits.gather(1, index)).squeeze(1) * keep).sum()
    grad = logits.sub_(lse).exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad.masked_fill_(~keep[:, None], 0.0)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b；精度相同时一步写入，不另占一份 (V, C)。"""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b

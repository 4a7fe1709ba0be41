"""专家的均衡：两种损失、容量，与一次前向各层的负载之和。

N 词元数、E 专家数、k 每个词元的专家数、M 个 MoE 层。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.context import Load
from ..settings.moe_config import MoEConfig


class Balance(NamedTuple):
    """aux_loss 标量，已乘系数；load (M, E)；dropped (M,)。"""

    aux_loss: Tensor
    load: Tensor
    dropped: Tensor


def balance(moe: MoEConfig, loads: Sequence[Load]) -> Balance:
    """各 MoE 层的负载合到一起。损失取各层的平均，所以系数不随层数改变分量。"""
    first, *rest = (moe.aux_loss_coef * one.balance + moe.z_loss_coef * one.z for one in loads)
    return Balance(
        sum(rest, first) / len(loads),
        torch.stack([one.load for one in loads]),
        torch.stack([one.dropped for one in loads]),
    )


def balance_loss(load: Tensor, share: Tensor, real: Tensor | None) -> Tensor:
    """E·Σ f·P：f 每个专家分到的对数 / 词元数（和为 k），P 平均分数。均匀时是 k。

    k = 1 即 Switch 的式 4；k > 1 与 transformers 的 Mixtral 同一约定。f 没有梯度。
    load (E,)；share (N, E)；real (N,)：不是填充的词元，None = 全部。
    """
    n = _count(share, real)
    mean = _mean(share, real, n)
    return share.shape[1] * (load.to(mean.dtype) / n * mean).sum()


def z_loss(logits: Tensor, real: Tensor | None) -> Tensor:
    """logsumexp² 的平均：不让打分越长越大（Zoph et al. 2022, ST-MoE, arXiv:2202.08906, 式 5）。"""
    square = logits.logsumexp(-1).square()
    return _mean(square[:, None], real, _count(logits, real)).squeeze(0)


def capacity(factor: float, real: Tensor | None, tokens: int, k: int, experts: int) -> Tensor | int:
    """一个专家至多收几个：ceil(factor·N·k/E)，填充不算。"""
    if real is None:
        return math.ceil(factor * tokens * k / experts)
    return (real.sum().double() * factor * k / experts).ceil().long()


def _count(values: Tensor, real: Tensor | None) -> Tensor | int:
    """至少 1：一行都是填充时不除以零。"""
    return values.shape[0] if real is None else real.sum().clamp(min=1)


def _mean(values: Tensor, real: Tensor | None, n: Tensor | int) -> Tensor:
    """(N, ...) -> (...)，只数真词元。"""
    if real is not None:
        values = values.masked_fill(~real[:, None], 0.0)
    return values.sum(0) / n

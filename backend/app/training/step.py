"""一步的梯度：微批之和恰等于大批，不论微批怎样切、-100 落在哪里。

B 批大小，T 上下文长度。
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.distributed.sharding.rows import local, whole
from app.models.transformer import GPT2Model

from .machine.feeding import to_device
from .machine.runtime import Runtime

IGNORE = -100
# 第一步的损失离公式这么远就不寻常。
INITIAL_LOSS_OFF = 0.5


class Sums(NamedTuple):
    """一批（或其中一部分）的结果，都不带图。

    Attributes:
        loss: 标量，语言模型的平均损失；aux_loss：标量，均衡损失（没有 MoE 层为 0）。
        load: (M, E) 与 dropped (M,)：M 个 MoE 层各微批之和；没有 MoE 层为 None。
    """

    loss: Tensor
    aux_loss: Tensor
    load: Tensor | None
    dropped: Tensor | None

    def plus(self, other: Sums) -> Sums:
        both = zip(self, other, strict=True)
        return Sums(*(a if a is None or b is None else a + b for a, b in both))  # type: ignore[arg-type]


def accumulate(
    model: GPT2Model, inputs: np.ndarray, targets: np.ndarray, micro: int, runtime: Runtime
) -> Sums:
    """对 (B, T) 的一批求梯度，加进 .grad，每次 micro 行。"""
    valid, total = count_valid(targets), None
    for first in range(0, len(inputs), micro):
        rows = slice(first, first + micro)
        part = backward(model, inputs[rows], targets[rows], valid, runtime)
        total = part if total is None else total.plus(part)
    assert total is not None
    return total


def backward(
    model: GPT2Model, inputs: np.ndarray, targets: np.ndarray, valid: int, runtime: Runtime
) -> Sums:
    """一个微批的前向与反向：梯度加进 .grad，返回它在整批里的那一份。

    它的平均损失乘以它的有效词元占整批 valid 个的份额：先各自平均再平均，
    会在长短不一时算错（transformers #34191 即此）。

    均衡损失按微批定义：各微批在自己的词元上算，再按同样的份额平均。它是两个平均的乘积，所以切法
    不同值也不同（与 transformers、Megatron 的做法一致）；负载则是整批的。
    """
    x, y = to_device(inputs, runtime.device), to_device(targets, runtime.device)
    with runtime.autocast():
        out = model(x, targets=y)
    share = count_valid(targets, least=0) / valid
    loss = out["loss"] * share
    if "aux_loss" not in out:
        loss.backward()
        return Sums(loss.detach(), torch.zeros((), device=runtime.device), None, None)
    aux = out["aux_loss"] * share
    (loss + aux).backward()
    return Sums(loss.detach(), aux.detach(), out["expert_load"], out["expert_dropped"])


def count_valid(targets: np.ndarray, least: int = 1) -> int:
    """有效的目标数；整批的至少算 1，免得除以零。"""
    return max(least, int(np.count_nonzero(targets != IGNORE)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """全部梯度的范数，标量，还在设备上。"""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(
    parameters: Iterable[nn.Parameter], norm: Tensor, size: float, largest: float
) -> None:
    """范数大于 largest 就缩到 largest；size 是取到主机上的 norm，largest 为 0 是不裁剪。"""
    # 不必裁剪时系数恰为 1（分母里的 1e-6 是 torch 的）：省去读写一遍梯度。
    if largest and size + 1e-6 > largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def first_bad_weight(model: GPT2Model) -> str | None:
    """第一个含非有限数的权重的名字；None = 都是有限数。"""
    return _first_bad((name, p) for name, p in model.named_parameters())


def first_bad_gradient(model: GPT2Model) -> str | None:
    """第一个含非有限数的梯度的名字；None = 都是有限数。"""
    named = model.named_parameters()
    return _first_bad((name, p.grad) for name, p in named if p.grad is not None)


def _first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    # 几百个张量只与设备同步一次。
    found = [(name, torch.isfinite(local(x)).all()) for name, x in named]
    if not found:
        return None
    good = torch.stack([ok for _, ok in found]).tolist()
    return next((name for (name, _), ok in zip(found, good, strict=True) if not ok), None)


def expected_initial_loss(model: GPT2Model) -> float:
    """随机初始化时的损失：ln V 加上初始 logits 方差的一半。

    末层归一化的输出长 sqrt(C)，故 logits 的方差约为 C·mean(w²)（w 是输出头的权重）。
    共享权重时模型会认出自己的输入，词表很小时实际的损失比这略高。
    """
    weight = whole(model.head_weight.detach())
    variance = weight.shape[1] * float(weight.float().pow(2).mean())
    return math.log(weight.shape[0]) + 0.5 * variance


def initial_loss_line(model: GPT2Model, loss: float, expected: float) -> str:
    """一句话说明第一步的损失是否寻常。"""
    vocab = model.config.vocab_size
    verdict = (
        "as it should be"
        if abs(loss - expected) < INITIAL_LOSS_OFF
        else "UNUSUAL: look at the data, the vocabulary size and the initialisation"
    )
    return (
        f"first loss {loss:.3f}, expected about {expected:.3f} "
        f"(ln {vocab} = {math.log(vocab):.3f} for blind guessing): {verdict}"
    )

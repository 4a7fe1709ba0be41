"""一步的梯度：微批之和恰等于大批，不论微批怎样切、-100 落在哪里。

B 批大小，T 上下文长度。
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.data.batch import Batch
from app.distributed.sharding.rows import local, whole
from app.models.transformer import GPT2Model

from .config import TrainConfig
from .machine.runtime import Runtime
from .objectives.language_model import LanguageModel
from .objectives.objective import Objective, Rows

LM = LanguageModel()
# 第一步的损失离公式这么远就不寻常。
INITIAL_LOSS_OFF = 0.5
# bfloat16 里两遍前向的舍入。
DPO_LOSS_OFF = 0.01


class Sums(NamedTuple):
    """一批（或其中一部分）的结果，都不带图。

    Attributes:
        loss: 标量，目标的平均损失；aux_loss：标量，均衡损失（没有 MoE 层为 0）。
        load: (M, E) 与 dropped (M,)：M 个 MoE 层各微批之和；没有 MoE 层为 None。
        numbers: (K,)，Objective.names 的各数；没有则 None。
        weight: 数了几个：计分的词元，或对。
    """

    loss: Tensor
    aux_loss: Tensor
    load: Tensor | None
    dropped: Tensor | None
    numbers: Tensor | None = None
    weight: int = 0

    def plus(self, other: Sums) -> Sums:
        both = zip(self, other, strict=True)
        return Sums(*(None if a is None or b is None else a + b for a, b in both))  # type: ignore[arg-type]

    @property
    def tensors(self) -> list[Tensor]:
        """各张量，没有的不在内；filled 是反面。"""
        return [x for x in self[:-1] if isinstance(x, Tensor)]

    def filled(self, tensors: Sequence[Tensor], weight: int) -> Sums:
        """同样几项，换成 tensors 里的。"""
        names = [name for name in self._fields[:-1] if getattr(self, name) is not None]
        found: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return self._replace(weight=weight, **found)


def accumulate(
    model: GPT2Model, batch: Batch, micro: int, runtime: Runtime, objective: Objective = LM
) -> Sums:
    """对 (B, T) 的一批求梯度，加进 .grad，每次 micro 行。"""
    weight, total = max(1, objective.weight(batch)), None
    for first in range(0, len(batch), micro):
        part = backward(model, batch.rows(slice(first, first + micro)), weight, runtime, objective)
        total = part if total is None else total.plus(part)
    assert total is not None
    return total


def backward(
    model: GPT2Model, batch: Batch, weight: int, runtime: Runtime, objective: Objective = LM
) -> Sums:
    """一个微批的前向与反向：梯度加进 .grad，返回它在整批里的那一份。

    它的平均损失乘以它计分的词元（或对）占整批 weight 个的份额：先各自平均再平均，
    会在长短不一时算错（transformers #34191 即此）。

    均衡损失按微批定义：各微批在自己的词元上算，再按同样的份额平均。它是两个平均的乘积，所以切法
    不同值也不同（与 transformers、Megatron 的做法一致）；负载则是整批的。
    """
    rows = Rows.on(batch, runtime.device)
    with runtime.autocast():
        loss, out, numbers = objective.score(model, rows)
    mine = objective.weight(batch)
    share = mine / weight
    loss = loss * share
    numbers = None if numbers is None else numbers * share
    if "aux_loss" not in out:
        loss.backward()
        none = torch.zeros((), device=runtime.device)
        return Sums(loss.detach(), none, None, None, numbers, mine)
    aux = out["aux_loss"] * share
    (loss + aux).backward()
    load, dropped = out["expert_load"], out["expert_dropped"]
    return Sums(loss.detach(), aux.detach(), load, dropped, numbers, mine)


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


def first_loss_line(config: TrainConfig, model: GPT2Model, loss: float, expected: float) -> str:
    """第一步的损失该是多少，由目标与权重从哪里来说。"""
    objective = config.objective
    if objective.kind == "dpo" and objective.reference == "auto":
        # 一步之前模型就是参考；离 ln 2 远，就是参考不对（trl #1962）。
        off = abs(loss - math.log(2)) > DPO_LOSS_OFF and not objective.dpo_sft
        verdict = "UNUSUAL: the reference is not this model" if off else "as it should be"
        return f"first loss {loss:.4f}, expected ln 2 = {math.log(2):.4f}: {verdict}"
    if objective.kind != "lm" or config.init_from is not None:
        return f"first loss {loss:.3f} (weights from {config.init_from or 'a random start'})"
    return initial_loss_line(model, loss, expected)


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

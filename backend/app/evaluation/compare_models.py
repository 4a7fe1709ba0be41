"""两个模型在同一些窗口上相差多少：KL、最可能的词元变了几次、困惑度与它的噪声。

W 窗口数、T 词元数、V 词表。
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from app.models.transformer import GPT2Model


@dataclass(frozen=True)
class Quality:
    """同一些窗口上的两个模型。

    Attributes:
        kl: 每个位置的 KL(before ‖ after)，nat，平均。
        flips: 最可能的词元变了的位置，占几分之几。
        nats: (before, after) 每词元的 nat。
        noise: 两者之差的标准误，以窗口为整群；只有一个窗口时 None。
    """

    tokens: int
    kl: float
    flips: float
    nats: tuple[float, float]
    noise: float | None

    @property
    def perplexity(self) -> tuple[float, float]:
        before, after = self.nats
        return math.exp(before), math.exp(after)


@torch.inference_mode()
def compare_quality(before: GPT2Model, after: GPT2Model, windows: Tensor) -> Quality:
    """windows (W, T + 1)。

    Raises:
        ValueError: logits 不是有限数。
    """
    kl = flips = 0.0
    nats = []
    for window in windows.to(before.device):
        ids, targets = window[None, :-1], window[1:]
        p, q = (m(ids)["logits"][0].float().log_softmax(-1) for m in (before, after))
        kl += float((p.exp() * (p - q)).sum())
        flips += float((p.argmax(-1) != q.argmax(-1)).sum())
        nats.append([-float(x.gather(1, targets[:, None]).sum()) for x in (p, q)])
    count, tokens = windows.shape[0], windows.shape[1] - 1
    total = count * tokens
    if not all(math.isfinite(number) for number in (kl, *(n for each in nats for n in each))):
        raise ValueError("the logits are not finite numbers: the model's weights are damaged")
    changes = [(q - p) / tokens for p, q in nats]
    noise = statistics.stdev(changes) / math.sqrt(count) if count > 1 else None
    sums = [math.fsum(each) / total for each in zip(*nats, strict=True)]
    return Quality(total, max(kl / total, 0.0), flips / total, (sums[0], sums[1]), noise)

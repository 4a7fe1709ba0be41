"""两个模型算的是不是同一回事：随机词元上 logits 最大的差。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from app.models.transformer import GPT2Model

TOKENS = 256
# float64 的舍入在 1e-13 上下，而少抄一个矩阵之类的错误在 1e-3 以上。
_EXACT = 1e-9


class Difference(NamedTuple):
    """一种精度下最大的差，与最大的 logit。"""

    dtype: str
    largest: float
    logit: float


def largest_differences(one: GPT2Model, other: GPT2Model) -> list[Difference]:
    """先按存下的精度，再按 float64，那里舍入不再遮住真的差别；两个模型就此留在 float64。"""
    generator = torch.Generator().manual_seed(0)
    count = min(TOKENS, one.config.context_size, other.config.context_size)
    ids = torch.randint(one.config.vocab_size, (1, count), generator=generator)
    found = []
    for dtype in dict.fromkeys((one.head_weight.dtype, torch.float64)):
        with torch.inference_mode():
            a, b = (model.to(dtype)(ids)["logits"] for model in (one, other))
        name = str(dtype).removeprefix("torch.")
        found.append(Difference(name, float((a - b).abs().max()), float(a.abs().max())))
    return found


def same(found: Sequence[Difference]) -> bool:
    """按 float64 的那一个；NaN 不算相同。"""
    exact = found[-1]
    return exact.largest <= _EXACT * max(1.0, exact.logit)

"""逐层的预言（logit lens）：每层之后的残差流直接过输出头，这一层会说什么。

nostalgebraist 2020, "interpreting GPT: the logit lens"。只有 pre 的模型在输出头之前另有一个归一化，
那里先过它；post、deepnorm、keel 的残差流每层都已归一化过，末尾没有，所以直接过输出头。
N 层数、T 词元数、C 宽度、V 词表。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.models.transformer import GPT2Model

from .attention import to_numpy
from .slices import Slice, Steps
from .walk import final

TOP = 5
# 没有真的下一个词元（最后一列）。
NO_RANK = 2**32 - 1


@dataclass(frozen=True)
class Lens:
    """top_id、top_p (N+1, T, 5)；其余 (N+1, T)。

    Attributes:
        rank: 真的下一个词元排第几，0 最前；没有的是 NO_RANK。
        kl: KL(最后一层 ‖ 这一层)，纳特；entropy: 纳特。
    """

    top_id: np.ndarray
    top_p: np.ndarray
    rank: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray


def lens(
    model: GPT2Model, streams: Sequence[Tensor], ids: Sequence[int], width: int, rows: int
) -> Steps[Lens]:
    """streams: N+1 个 (T, C)；width: 词表里真有词元的部分；rows: 一片至多几行。"""
    length, cost = len(ids), width * model.config.n_embed
    parts = [slice(i, min(i + rows, length)) for i in range(0, length, rows)]
    ends: list[Tensor] = []
    for part in parts:
        yield Slice(part.stop - part.start, cost)
        ends.append(final(model, streams[-1][part], width).log_softmax(-1))
    following = torch.tensor([*ids[1:], -1], device=streams[0].device)
    found: list[list[tuple[Tensor, ...]]] = []
    for stream in streams:
        found.append([])
        for part, end in zip(parts, ends, strict=True):
            yield Slice(part.stop - part.start, cost)
            logs = final(model, stream[part], width).log_softmax(-1)
            found[-1].append(read(logs, end, following[part]))
    joined = [[torch.cat(one) for one in zip(*row, strict=True)] for row in found]
    top_id, top_p, rank, kl, entropy = (
        to_numpy(torch.stack(one)) for one in zip(*joined, strict=True)
    )
    return Lens(top_id, top_p, rank, kl, entropy)


def rank_of(logs: Tensor, tokens: Tensor) -> Tensor:
    """(T, V) 与 (T,) -> (T,)：有几个词元比它更可能。"""
    return (logs > logs.gather(-1, tokens[:, None])).sum(-1)


def read(logs: Tensor, end: Tensor, following: Tensor) -> tuple[Tensor, ...]:
    """logs、end (T, V) 对数概率，following (T,) 真的下一个（-1 = 没有）-> Lens 的五样。"""
    values, index = logs.topk(min(TOP, logs.shape[-1]), dim=-1)
    rank = rank_of(logs, following.clamp(min=0)).masked_fill(following < 0, NO_RANK)
    # 两个分布相同时，舍入也可能使和略小于零；KL 没有负的。
    kl = (end.exp() * (end - logs)).sum(-1).clamp(min=0)
    return index, values.exp(), rank, kl, -(logs.exp() * logs).sum(-1)

"""每个头在做什么：在重复的随机词元上，它看自己的前一个、第一个，还是上一次之后的那个。

归纳头（Olsson et al. 2022, arXiv:2209.11895）：...A B ... A 里，第二个 A 看向 B，于是写得出 B。
词元是随机的，没有别的可看，所以只有真在抄写的头才得分。
H 查询头数、N 层数、n 重复的一段有多长、T = 2n。
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.models.transformer import GPT2Model

from .slices import Steps
from .walk import walk

_LONGEST, _SHORTEST, _SEED = 64, 4, 0


@dataclass(frozen=True)
class Heads:
    """各 (N, H)，0 到 1：给那个键的权重，各查询平均。length: 重复的一段有多长。"""

    induction: np.ndarray
    previous: np.ndarray
    first: np.ndarray
    length: int


def repeated(model: GPT2Model, width: int, avoid: Collection[int] = ()) -> list[int]:
    """一段互不相同的随机词元，写两遍；种子固定，所以各检查点读的是同一段。

    Args:
        avoid: 不用的词元，如文档分隔符。

    Raises:
        ValueError: 上下文或词表放不下四个词元写两遍。
    """
    usable = [i for i in range(width) if i not in avoid]
    length = min(_LONGEST, model.config.context_size // 2, len(usable))
    if length < _SHORTEST:
        raise ValueError(
            f"head scores need {_SHORTEST} different tokens written twice: "
            f"context_size={model.config.context_size} and a vocabulary of {len(usable)} hold "
            f"{length}"
        )
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(_SEED))
    once = [usable[i] for i in order[:length].tolist()]
    return once * 2


def heads(model: GPT2Model, width: int, avoid: Collection[int] = ()) -> Steps[Heads]:
    """
    Raises:
        ValueError: 见 repeated。
    """
    ids = repeated(model, width, avoid)
    found = yield from walk(model, ids, maps=range(model.config.n_layer))
    maps = [found.maps[layer] for layer in range(model.config.n_layer)]
    length = len(ids) // 2
    rows = [[_mean(one, *pairs) for one in maps] for pairs in _places(length)]
    return Heads(*(np.array([r.tolist() for r in row]) for row in rows), length)


def _places(n: int) -> list[tuple[Tensor, Tensor]]:
    """三种得分各看哪些 (查询, 键)。"""
    second, later = torch.arange(n, 2 * n), torch.arange(1, 2 * n)
    return [(second, second - n + 1), (later, later - 1), (later, torch.zeros_like(later))]


def _mean(weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """(H, T, T) -> (H,)。"""
    return weights[:, queries, keys].double().mean(-1)

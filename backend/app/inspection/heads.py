"""每个头在做什么：在重复的随机词元上，它看自己的前一个、第一个，还是上一次之后的那个。

归纳头（Olsson et al. 2022, arXiv:2209.11895）：...A B ... A 里，第二个 A 看向 B，于是写得出 B。
词元是随机的，没有别的可看，所以只有真在抄写的头才得分。
H 查询头数、N 层数、n 重复的一段有多长、T = 2n。
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from app.models.transformer import GPT2Model

from .slices import Steps
from .walk import walk

_LONGEST, _SHORTEST, _SEED = 64, 4, 0


class Words(Protocol):
    """分词器里这里要的几样。"""

    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_ids(self) -> Sequence[int]: ...
    @property
    def document_separator(self) -> int | None: ...


@dataclass(frozen=True)
class Heads:
    """各 (N, H)，0 到 1：给那个键的权重，各查询平均。length: 重复的一段有多长。"""

    induction: np.ndarray
    previous: np.ndarray
    first: np.ndarray
    length: int


def plain_ids(tokenizer: Words, vocabulary: int) -> list[int]:
    """可以随机挑的词元：模型认得的，去掉分隔符与结尾（模型见了它们就重新开头）。"""
    special = {*tokenizer.stop_ids, tokenizer.document_separator}
    return [i for i in range(min(tokenizer.vocab_size, vocabulary)) if i not in special]


def repeated(context: int, plain: Sequence[int]) -> list[int]:
    """plain 里互不相同的几个词元，写两遍；种子固定，所以各检查点读的是同一段。

    Raises:
        ValueError: 上下文或词表放不下四个词元写两遍。
    """
    length = min(_LONGEST, context // 2, len(plain))
    if length < _SHORTEST:
        raise ValueError(
            f"head scores need {_SHORTEST} different tokens written twice: context_size={context} "
            f"and a vocabulary of {len(plain)} hold {length}"
        )
    return random.Random(_SEED).sample(list(plain), length) * 2


def heads(model: GPT2Model, plain: Sequence[int]) -> Steps[Heads]:
    """plain: 可以随机挑的词元，见 plain_ids。

    Raises:
        ValueError: 见 repeated。
    """
    ids = repeated(model.config.context_size, plain)
    found = yield from walk(model, ids, maps=range(model.config.n_layer))
    return scores([found.maps[layer] for layer in range(model.config.n_layer)])


def scores(maps: Sequence[Tensor]) -> Heads:
    """maps: 每层一个 (H, 2n, 2n)，重复了一遍的 2n 个词元上的。"""
    length = maps[0].shape[-1] // 2
    induction, previous, first = (
        torch.stack([_mean(one, *pairs) for one in maps]).cpu().numpy() for pairs in _places(length)
    )
    return Heads(induction, previous, first, length)


def stacked(each: Sequence[Heads]) -> Heads:
    """几个检查点的：各 (C, N, H)。"""
    return Heads(
        np.stack([one.induction for one in each]),
        np.stack([one.previous for one in each]),
        np.stack([one.first for one in each]),
        each[0].length,
    )


def _places(n: int) -> list[tuple[Tensor, Tensor]]:
    """三种得分各看哪些 (查询, 键)。"""
    second, later = torch.arange(n, 2 * n), torch.arange(1, 2 * n)
    return [(second, second - n + 1), (later, later - 1), (later, torch.zeros_like(later))]


def _mean(weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """(H, T, T) -> (H,)。"""
    return weights[:, queries, keys].double().mean(-1)

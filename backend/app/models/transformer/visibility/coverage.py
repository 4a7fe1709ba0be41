"""图样看得见多少：每个查询几个键，占因果的几成。show 与 plan 共用。

T 词元数、n 抽查的查询数。
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.models.transformer.visibility.pattern import Pattern
from app.models.transformer.visibility.positions import Positions
from app.models.transformer.visibility.rule import visible

# 一共看这么多对：8,192 个词元之内逐个数，更长的只抽查一部分查询。
_PAIRS = 1 << 26
_LEAST_QUERIES = 16
_CHUNK = 1 << 22
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Coverage:
    """length 个词元上的可见键数。

    Attributes:
        mean, most: 每个查询的键数，平均与最多。
        share: 看得见的对数占因果对数 T(T+1)/2 的比例。
        exact: False = 由抽查的查询估计。
    """

    length: int
    mean: float
    most: int
    share: float
    exact: bool


def coverage(pattern: Pattern, length: int) -> Coverage:
    """
    Raises:
        ValueError: length 小于 1。
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    if length <= pattern.solid:
        return Coverage(length, (length + 1) / 2, length, 1.0, True)
    queries = _queries(length)
    counts = torch.cat(
        [_rows(pattern, part, length).sum(1) for part in queries.split(max(1, _CHUNK // length))]
    )
    mean = counts.double().mean().item()
    share = min(1.0, 2 * mean / (length + 1))
    return Coverage(length, mean, int(counts.max()), share, len(queries) == length)


def seen(pattern: Pattern, length: int) -> Tensor:
    """(T, T) bool：第 q 行是查询 q 看得见的键。"""
    return _rows(pattern, torch.arange(length), length)


def as_text(pattern: Pattern, length: int) -> str:
    """同一张图的文字版：# 看得见，. 看不见，还没有到的不写。"""
    rows = seen(pattern, length).tolist()
    return "\n".join("".join(".#"[k] for k in row[: q + 1]) for q, row in enumerate(rows))


def _rows(pattern: Pattern, queries: Tensor, length: int) -> Tensor:
    keys = Positions.plain(0, length, torch.device("cpu"))
    return visible(Positions(queries[None]), keys, pattern)[0]


def _queries(length: int) -> Tensor:
    """短则全部；长则每段抽一个，段内的偏移用黄金分割错开，免得与图样的周期同步。"""
    count = max(_LEAST_QUERIES, _PAIRS // length)
    if count >= length:
        return torch.arange(length)
    index = torch.arange(count, dtype=torch.float64)
    return ((index + index * _GOLDEN % 1) * (length / count)).long()

"""副本：每个 rank 一份完整的模型，各读一批里连着的几行，梯度加在一棵固定的树上。

浮点加法不满足结合律，所以"先各自加、再 all_reduce"的末位随 rank 数变，几百步之后就是另一串权重
（12 步的 AdamW 已差 1.2e-3）。这里微批是树的叶子：每个 rank 恰有一棵子树，W = 1、2、4 加的次序
完全相同。代价是一个 rank 同时留着 log2(叶子数) + 1 份梯度，蝶形交换比 all_reduce 慢。

L 叶子（微批）数，W rank 数，B 一批的行数。
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .comm import Ranks

# 一次交换这么多元素：够大使延迟不计，又只多占两份。
BUCKET = 8 << 20


def my_rows(batch: int, ranks: Ranks) -> slice:
    """第 r 个 rank 读第 r 段连着的行。"""
    each = batch // ranks.size
    return slice(ranks.rank * each, (ranks.rank + 1) * each)


def leaf_group(leaves: int) -> int:
    """几片叶子先依次相加，使其余的是一棵完全二叉树：L = 2^k·m，m 是奇数，返回 m。

    W 是 2 的幂且整除 L，就也整除 2^k：分给谁都不拆开一组。
    """
    return leaves // (leaves & -leaves)


def seed_rows(seed: int, step: int, row: int) -> None:
    """dropout 的掩码只由 (seed, step, 微批的第一行) 定，与哪个 rank 算、之前算过什么无关。"""
    digest = hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class TreeSum:
    """一个 rank 上的叶子两两相加，像二进制计数器进位；同时至多留 log2(叶子数) + 1 份。"""

    def __init__(self) -> None:
        self._held: list[tuple[int, list[Tensor]]] = []

    def add(self, leaf: list[Tensor]) -> None:
        """收下 leaf，会就地改写它们。"""
        height = 0
        while self._held and self._held[-1][0] == height:
            left = self._held.pop()[1]
            for ours, theirs in zip(left, leaf, strict=True):
                ours += theirs
            leaf, height = left, height + 1
        self._held.append((height, leaf))

    def total(self) -> list[Tensor]:
        ((_, total),) = self._held
        return total


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """取走 .grad；没有用到的参数是零：各 rank 的表要一样长。"""
    found = []
    for parameter in parameters:
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return found


def give_gradients(parameters: Iterable[nn.Parameter], found: Iterable[Tensor]) -> None:
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient


def tree_sum(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """各 rank 的 tensors 逐个相加，就地；次序固定。"""
    for bucket in () if ranks.alone else _buckets(tensors):
        _in_one(bucket, ranks.tree_sum)


def plain_sum(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """同 tree_sum，次序由后端定：快，不保证位。"""
    for bucket in () if ranks.alone else _buckets(tensors):
        _in_one(bucket, ranks.sum)


def row_squares(gradient: Tensor) -> Tensor:
    """(A, ...) -> (A,) float64：各行的平方和；一维的每个元素是一行。

    切分只切行，所以每行的数与怎样切无关，聚齐之后大家加的是同一串数。
    """
    if gradient.ndim < 2:
        return gradient.double().square()
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).square_()


def total_norm(rows: Iterable[Tensor]) -> Tensor:
    """各参数各行的平方和 -> 总范数，标量 float64。"""
    return torch.cat([one.reshape(-1) for one in rows]).sum().sqrt()


def clip(gradients: list[Tensor], norm: float, largest: float) -> None:
    """范数大于 largest 就缩到 largest；为 0 是不裁剪。系数是主机上的一个数，处处相同。"""
    # 1e-6 是 torch 的 clip_grad_norm_ 的。
    if largest and norm + 1e-6 > largest:
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """连着的、类型相同的放在一起，至多 BUCKET 个元素（除非一个就更多）。"""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(one.numel() for one in bucket) + tensor.numel() > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _in_one(bucket: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
    flat = torch.cat([one.reshape(-1) for one in bucket])
    reduce(flat)
    for one, part in zip(bucket, flat.split([b.numel() for b in bucket]), strict=True):
        one.copy_(part.view_as(one))

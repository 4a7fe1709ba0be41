"""蒸馏（Hinton et al. 2015, arXiv:1503.02531）：(1-α)·交叉熵 + α·T²·KL(教师 ‖ 学生)。

KL 是正向的：学生要盖住教师的每一处；两边都除以温度 T，T² 使梯度的大小不随 T 变。两边的 logits 都
一块一块地算，(N, V) 从不整张存在，更不会有两张。

N 词元数、R 一块的行数、C 宽度、V 词表；教师的宽度与词表可以不同。
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from app.data.batch import Batch
from app.models.transformer import GPT2Model
from app.models.transformer.layers.cpu_products import product
from app.models.transformer.layers.loss import (
    IGNORE,
    as_computed,
    cross_entropy,
    head_cross_entropy,
)

from .objective import Rows, Scored, count_scored, forward


class Distill:
    """
    Args:
        teacher: 已在设备上，eval，不求梯度；与学生同一个分词器（词表的补齐可以不同）。
    """

    names: ClassVar[tuple[str, ...]] = ("ce", "kl")

    def __init__(self, teacher: GPT2Model, alpha: float, temperature: float) -> None:
        self._teacher, self._alpha, self._temperature = teacher, alpha, temperature

    def weight(self, batch: Batch) -> int:
        return count_scored(batch.targets)

    def score(self, model: GPT2Model, rows: Rows) -> Scored:
        mixed = _Mixed(*self._taught(rows), self._alpha, self._temperature)

        def head(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
            return head_cross_entropy(hidden, weight, targets, mixed)

        out = forward(model, rows, head)
        return Scored(out["loss"], out, mixed.means())

    def _taught(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """教师在头之前的 (N, C) 与它的头 (V, C)，都是计算的精度。"""
        seen: list[Tensor] = []

        def head(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
            seen.extend((as_computed(hidden.flatten(0, 1)), as_computed(weight)))
            return hidden.new_zeros(())

        with torch.no_grad():
            forward(self._teacher, rows, head)
        return seen[0], seen[1]


class _Mixed:
    """head_cross_entropy 的一块：两种损失按 α 相加，各自的和另记着。"""

    def __init__(self, hidden: Tensor, weight: Tensor, alpha: float, temperature: float) -> None:
        self._hidden, self._weight = hidden, weight
        self._alpha, self._temperature = alpha, temperature
        self._sums: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        # 教师的这一块不留名字：divergence 用完就放掉。
        kl, kl_grad = divergence(
            logits, product(self._hidden[rows], self._weight), self._temperature
        )
        ce, grad = cross_entropy(logits, labels, rows)
        keep = labels != IGNORE
        self._sums.append(torch.stack([(ce * keep).sum(), (kl * keep).sum(), keep.sum()]))
        own, theirs = 1.0 - self._alpha, self._alpha * self._temperature**2
        return own * ce + theirs * kl, grad.mul_(own).add_(kl_grad, alpha=theirs)

    def means(self) -> Tensor:
        """(2,)：交叉熵与 KL（不带 T²）的平均。"""
        total = torch.stack(self._sums).sum(0)
        return total[:2] / total[2].clamp(min=1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits (R, V) 与 (R, V') -> 各行的 KL(教师 ‖ 学生) (R,) 与它对 student 的梯度 (R, V)。

    学生没有的行（教师词表的补齐）教师那里先去掉；教师没有的行它的概率就是 0。
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    common = min(student.shape[1], teacher.shape[1])
    # 一块就有 CHUNK_BYTES：能就地的都就地，除了 logits 同时只有三块。
    ours = student.to(wide) / temperature
    torch.log_softmax(ours, -1, out=ours)
    theirs = teacher[:, :common].to(wide) / temperature
    del teacher
    torch.log_softmax(theirs, -1, out=theirs)
    chance = theirs.exp()
    kl = theirs.sub_(ours[:, :common]).mul_(chance).sum(-1)
    grad = ours.exp_()
    grad[:, :common] -= chance
    return kl, grad.div_(temperature)

"""一种并行（一条轴）在一步里要说的几件事；几条轴一起走一步的是 split.py。

一步这样走，次序与轴的多少无关：

    x, y = way.batch(x), way.batch(y)              逐条轴；这个 rank 读的那部分
    loss = model(x, targets=y)["loss"] * 份额       份额 = 这里的有效目标数 / 全局的有效目标数
    loss.backward()                                 各微批之后：
    way.finish_gradients()                          逐条轴；此后 .grad 是整批的（数据的轴之外）
    norm = gradient_norm(model, ways)
    报告的损失：splits_batch 的轴上求和，别的轴上各 rank 相等。

梯度只求和，从不除以 rank 数：份额已是全局的。检查点逐个名字问 whole（集合操作，各 rank 同一次序），
复原问 part；优化器里与参数同形的状态用同一个名字。要一块一块地读写的，照 rules 与 layout.spans。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Model

from ..comm import Ranks
from ..sharding.rows import local
from .layout import Axis, Cut, cut, cut_of, join

# 范数里：same = 轴上各 rank 相同，数一次；part = 各 rank 的相加；elsewhere = 别的 rank 数它。
Count = Literal["same", "part", "elsewhere"]
# 一次求和的元素数到这么多为止：再多就只是多占一份内存。
BUCKET = 4 << 20


class Way:
    """什么也不切的一条轴；各种并行改写它们不同的几项。

    Attributes:
        splits_batch: 轴上各 rank 读的词元不同，于是损失、负载是各 rank 之和。
    """

    splits_batch: ClassVar[bool] = False

    def __init__(self, model: GPT2Model, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    def batch(self, x: Any) -> Any:
        """(B, T) 的数组或张量 -> 这个 rank 读的部分。"""
        return x

    def finish_gradients(self) -> None:
        """反向全部做完之后：把不完整的梯度在轴上求和。"""

    def count(self, name: str) -> Count:
        """name 的梯度怎样计入范数。"""
        return "same"

    def whole(self, name: str, mine: Tensor | None) -> Tensor | None:
        """各 rank 的份 -> 完整的张量；集合操作。None：轴上没有一个有它（流水线的别的段）。"""
        return mine

    def part(self, name: str, whole: Tensor) -> Tensor:
        """完整的张量 -> 这个 rank 的份。"""
        return whole


class CutWay(Way):
    """按 layout.py 的表把权重切在一条轴上。"""

    axis: ClassVar[Axis]

    def __init__(self, model: GPT2Model, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        tensors = dict(model.named_parameters())
        rules = {name: cut_of(name, p.shape, model.config) for name, p in tensors.items()}
        self.rules: dict[str, Cut | None] = {
            name: rule if rule is not None and rule.axis == self.axis else None
            for name, rule in rules.items()
        }
        pieces = {name: self.part(name, p.detach()) for name, p in tensors.items()}
        for name, rule in self.rules.items():
            if rule is not None:
                replace_parameter(model, name, pieces[name])

    def count(self, name: str) -> Count:
        return "same" if self.rules[name] is None else "part"

    def whole(self, name: str, mine: Tensor | None) -> Tensor | None:
        rule = self.rules.get(name)
        if mine is None or rule is None:
            return mine
        return join([*self.ranks.gather(mine)], rule)

    def part(self, name: str, whole: Tensor) -> Tensor:
        return cut(whole, self.rules[name], self.ranks.rank, self.ranks.size)


def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """就地求和，许多小的并成一次。一个 rank 上没有梯度的也要参加，否则别的 rank 等不到它。"""
    bucket: list[Tensor] = []
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if bucket and (bucket[-1].dtype != p.grad.dtype or _size(bucket) > BUCKET):
                _sum_together(bucket, ranks)
                bucket = []
            bucket.append(local(p.grad))
    if bucket:
        _sum_together(bucket, ranks)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def _sum_together(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    flat = ranks.sum(torch.cat([x.reshape(-1) for x in tensors]))
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(part.view_as(x))


def gradient_norm(gradients: Mapping[str, Tensor], ways: Sequence[Way]) -> Tensor:
    """整个模型的梯度的范数，float64；各 rank 得到同一个数。

    每个元素数一次：在哪几条轴上是各 rank 相加，就只在那几条轴上求和。
    """
    counts = {name: tuple(way.count(name) for way in ways) for name in gradients}
    # 各 rank 有的名字可以不同（流水线），要加的次数却要相同：按轴的子集列全。
    sums = torch.zeros(2 ** len(ways), dtype=torch.float64)
    for name, grad in gradients.items():
        if "elsewhere" not in counts[name]:
            kind = sum(1 << i for i, count in enumerate(counts[name]) if count == "part")
            sums[kind] += grad.detach().double().square().sum().cpu()
    kinds = torch.arange(len(sums))
    for i, way in enumerate(ways):
        added = (kinds >> i & 1).bool()
        sums[added] = way.ranks.sum(sums[added])
    return sums.sum().sqrt()


def replace_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, old.requires_grad))


def override(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """只在这一个模块上换下几个方法：类型、参数的名字、父模块都不变，主干不知道。"""
    vars(module).update(methods)


def check_divides(name: str, value: int, axis: str, ranks: Ranks) -> None:
    """
    Raises:
        ValueError: value 不能等分。
    """
    if value % ranks.size:
        raise ValueError(
            f"{name}={value} cannot be split evenly over parallel.{axis}={ranks.size}: use a "
            f"degree that divides {value}"
        )


def check_no_dropout(model: GPT2Model, axis: str, ranks: Ranks) -> None:
    """
    Raises:
        ValueError: 一个进程里的随机掩码，切开之后重现不了。
    """
    if model.config.dropout:
        raise ValueError(
            f"dropout={model.config.dropout} with parallel.{axis}={ranks.size}: the masks of one "
            "process cannot be drawn again in pieces; use dropout=0"
        )

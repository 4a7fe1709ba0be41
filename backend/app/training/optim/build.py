"""优化器：一种一个文件，文件名就是配置里的名字；它自己登记，自己建，自己说占多少内存。

加一种：config.py 的 Optimizer 里添上名字，这个文件夹里添上同名的文件，其中一个类带 @register。
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import ClassVar, TypeVar, get_args

import torch
from torch import nn

from app.models.transformer import GPT2Model

from ..config import OptimConfig, Optimizer

Named = list[tuple[str, nn.Parameter]]
Shapes = Mapping[str, tuple[int, ...]]

FLOAT32_BYTES = 4


class OptimizerKind(ABC):
    """一种优化器，连同它的设置。

    Attributes:
        keeps: 它为每个参数记着什么，英文，给 `gpt2 plan` 的表。
    """

    keeps: ClassVar[str]

    def __init__(self, config: OptimConfig) -> None:
        self.config = config

    @abstractmethod
    def build(self, model: GPT2Model) -> tuple[torch.optim.Optimizer, str]:
        """(优化器, 一句话说明选了哪种实现)；各组的 lr 是学习率的峰值。"""

    @abstractmethod
    def state_bytes(self, shapes: Shapes) -> int:
        """各参数的状态一共占的字节数；shapes 是会训练的参数。"""

    def update_bytes(self, shapes: Shapes) -> int:
        """更新时的临时张量。"""
        return 0


_KINDS: dict[str, type[OptimizerKind]] = {}

K = TypeVar("K", bound=type[OptimizerKind])


def register(name: Optimizer) -> Callable[[K], K]:
    """登记成 optim.name=name。

    Raises:
        ValueError: 配置里没有这个名字，或它已经登记过。
    """
    if name not in get_args(Optimizer):
        raise ValueError(
            f"optimizer {name!r} is not one of {list(get_args(Optimizer))}: add it to "
            "Optimizer in training/config.py"
        )
    if name in _KINDS:
        raise ValueError(f"optimizer {name!r} is registered twice: by {_KINDS[name].__name__}")

    def add(kind: K) -> K:
        _KINDS[name] = kind
        return kind

    return add


def optimizer_kind(config: OptimConfig) -> OptimizerKind:
    """config 点名的那一种。"""
    if config.name not in _KINDS:
        import_module(f"{__package__}.{config.name}")
    return _KINDS[config.name](config)


def build_optimizer(model: GPT2Model, config: OptimConfig) -> tuple[torch.optim.Optimizer, str]:
    """(优化器, 一句话说明选了哪种实现)；各组的 initial_lr 是学习率的峰值。"""
    optimizer, why = optimizer_kind(config).build(model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer, why


def trainable(model: nn.Module) -> Named:
    """共享的权重（绑定的词嵌入）由 named_parameters 去重，只出现一次。"""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """矩阵（叠起来的专家也是）；叠起来的专家的偏置不是。"""
    return len(shape) >= 2 and not name.endswith(".bias")


def nbytes(shapes: Shapes) -> int:
    """训练时的参数总是 float32。"""
    return FLOAT32_BYTES * sum(map(math.prod, shapes.values()))

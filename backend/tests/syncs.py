"""数主机等设备的次数。CPU 上没有等，但读值的那些操作是一样的：取一个数、取回一表、形状随值而变。

`readable` 是"在这里看值不花什么"，数的时候当作不是：量的是加速器上走的那条路。
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.generation import sampling
from app.models.transformer.layers import loss
from app.models.transformer.visibility import inputs

_WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::is_nonzero",
}  # fmt: skip


class Syncs(TorchDispatchMode):
    """seen：各次的名字。"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1] if len(args) > 1
        )
        if name in _WAITS or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Syncs]:
    """其间的等待；tolist、numpy、cpu 各算一次，不论几个元素。"""
    mode = Syncs()
    with pytest.MonkeyPatch.context() as patch:
        for module in (sampling, loss, inputs):
            patch.setattr(module, "readable", lambda tensor: False)
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, _counting(mode, name))
        with mode:
            yield mode


def _counting(mode: Syncs, name: str) -> Any:
    plain = getattr(Tensor, name)

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = len(mode.seen)
        result = plain(self, *args, **kwargs)
        mode.seen[before:] = [name]
        return result

    return call

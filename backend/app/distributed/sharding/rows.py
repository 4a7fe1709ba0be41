"""一个张量在这个 rank 手里的那几行：DTensor（FSDP2 按第 0 维切）与普通张量同样看待。

W 一组里的 rank 数，R 整个张量的行数。
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """整个张量的第 [first, first + number) 行在我这里；普通张量是全部。

    Attributes:
        whole: 整个张量的行数；标量算一行。
    """

    first: int
    number: int
    whole: int


def is_sharded(x: Tensor) -> bool:
    # 不导入 DTensor：普通的训练用不着那一秒的导入。
    return hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """手里的那几行，与 x 同一块存储。"""
    if not is_sharded(x):
        return x
    mine = x.detach().to_local()  # type: ignore[attr-defined]
    assert isinstance(mine, Tensor)
    return mine


def whole(x: Tensor) -> Tensor:
    """整个张量；切开的要各 rank 一起来取。"""
    if not is_sharded(x):
        return x
    full = x.full_tensor()  # type: ignore[attr-defined]
    assert isinstance(full, Tensor)
    return full


def rows_of(x: Tensor) -> Rows:
    whole = len(x) if x.ndim else 1
    if not is_sharded(x):
        return Rows(0, whole, whole)
    mesh = x.device_mesh  # type: ignore[attr-defined]
    return chunk_rows(whole, mesh.get_local_rank(), mesh.size())


def chunk_rows(whole: int, rank: int, size: int) -> Rows:
    """FSDP2 的切法（torch.chunk）：每个 ceil(R/W) 行，最后的少几行或没有。"""
    each = -(-whole // size)
    first = min(whole, rank * each)
    return Rows(first, min(whole, first + each) - first, whole)

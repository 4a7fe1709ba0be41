"""注意力图：每个查询把多少权重给了每个键。由参考路径算，模型照常走它自己的后端。

T 词元数、H 查询头数、L 点名的层数。
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


class NotFinite(ValueError):
    """模型算出了 NaN 或无穷。"""


def as_arrays(maps: dict[int, Tensor]) -> dict[int, np.ndarray]:
    """{层: (H, T, T)}，至少单精度；看得见的键上每行和为 1。"""
    return {layer: to_numpy(weights) for layer, weights in maps.items()}


def as_bytes(weights: np.ndarray) -> np.ndarray:
    """权重 -> u8 = round(255 √w)。

    取平方根：长句里 1/T 上下的权重线性地取整全是零；T = 256 时 1/T 仍有 16 级。

    Raises:
        NotFinite: 有 NaN：取整会成为 0，像是没有看。
    """
    if not np.isfinite(weights).all():
        raise NotFinite("the attention weights are not finite: check the weights of this model")
    return np.rint(255 * np.sqrt(weights)).astype(np.uint8)


def to_numpy(x: Tensor) -> np.ndarray:
    """至少单精度的 numpy。"""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    array: np.ndarray = wide.cpu().numpy()
    return array

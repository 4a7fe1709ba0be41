"""梯度的范数：先是每行的平方和，再按固定的次序相加，全用 float64；与行在哪个 rank 上无关。

一行总在一个 rank 上，所以行内的和逐位相同；各行的和聚齐之后，大家加的是同一串数。
W 一组里的 rank 数，R 一个张量的行数。
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..comm import Ranks
from ..replicate import row_squares
from .rows import is_sharded, local


def gathered_rows(gradients: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """{名字: (R,) 各行的平方和}，每个 rank 上都是全部的行；一次通信。

    Args:
        ranks: 分片的那些 rank。
    """
    rows = {name: row_squares(local(grad)) for name, grad in gradients.items()}
    cut = [name for name, grad in gradients.items() if is_sharded(grad)]
    if ranks.alone or not cut:
        return rows
    # 各 rank 的行数可能不等：都补到 ceil(R/W)。
    sizes = [-(-len(gradients[name]) // ranks.size) for name in cut]
    padded = [
        pad(rows[name], (0, size - len(rows[name]))) for name, size in zip(cut, sizes, strict=True)
    ]
    everyone = ranks.gather(torch.cat(padded)).split(sizes, 1)
    for name, found in zip(cut, everyone, strict=True):
        rows[name] = found.reshape(-1)[: len(gradients[name])]
    return rows

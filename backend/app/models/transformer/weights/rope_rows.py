"""q、k 投影的行在 RoPE 的两种布局之间换次序：权重的事，前向用不着。"""

from __future__ import annotations

from torch import Tensor


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """把 half 布局的 q 或 k 投影变成 interleaved 的：只换行的次序，模型的输出不变。

    Args:
        weight: (heads·D, in) 的权重或 (heads·D,) 的偏置；qk_norm 的 (D,) 用 heads=1。

    Raises:
        ValueError: 行数分不成 heads 个偶数宽的头。
    """
    return _permute(weight, heads, 2, -1)


def to_half(weight: Tensor, heads: int) -> Tensor:
    """to_interleaved 的逆。"""
    return _permute(weight, heads, -1, 2)


def _permute(weight: Tensor, heads: int, *pairs: int) -> Tensor:
    rows = weight.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise ValueError(
            f"weight has {rows} rows, which are not heads={heads} heads of an even width"
        )
    grouped = weight.unflatten(0, (heads, *pairs))
    return grouped.transpose(1, 2).reshape(weight.shape)

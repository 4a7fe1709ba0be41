"""把一对对的数转过一个角：同一个式子的几种写法，各在一处最快；值由测试与式子逐一对照。

    (a, b) -> (a·cos - b·sin, b·cos + a·sin)

B 批、H 头数、T 词元数、D 头宽。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..settings.rope_config import RoPELayout


def turn(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """x (B, H, T, D)、cos 与 sin (B|1, 1, T, D/2) -> (B, H, T, D)，dtype 不变。

    dim：D 拆成 (2, D/2) 或 (D/2, 2) 之后，成对的那一维（-2 或 -1）。
    """
    if torch.compiler.is_compiling():
        return _turn_fused(x, cos, sin, dim)
    if torch.is_grad_enabled() and x.requires_grad:
        turned: Tensor = _Turn.apply(x, cos, sin, dim, 1.0)
        return turned
    return _turn_plain(x, cos, sin, dim, 1.0)


def turn_one(x: Tensor, cos: Tensor, sin: Tensor, layout: RoPELayout) -> Tensor:
    """解码一个词元时花费全在算子的个数上：x·cos 加上对调后的 x·(-sin, sin)。

    cos、sin (B|1, 1, 1, D)：每对写成 (cos, cos) 与 (-sin, sin)。
    """
    if layout == "half":
        swapped = x.roll(x.shape[-1] // 2, -1)
    else:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def _turn_plain(x: Tensor, cos: Tensor, sin: Tensor, dim: int, sign: float) -> Tensor:
    """每对 (a, b) 变成 (a·cos - b·sin, b·cos + a·sin)，sign=-1 则往回转；dim：成对的那一维。

    瓶颈是内存：写一遍 x·cos，再就地补上两半，不像 rotate_half 的式子要建几个同样大的中间张量。
    """
    if dim == -1 and x.dtype.itemsize < 4:
        # 相邻成对的走下面的复数，而半精度没有复数。
        return _turn_plain(x.to(cos.dtype), cos, sin, dim, sign).to(x.dtype)
    pairs = x.unflatten(-1, (2, -1) if dim == -2 else (-1, 2))
    if dim == -1 and _viewable_as_complex(x):
        # 隔一个取一个的就地加法不能向量化；复数乘法一遍走完。
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin * sign)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    out = pairs * cos.unsqueeze(dim)
    a, b = pairs.unbind(dim)
    left, right = out.unbind(dim)
    left.addcmul_(b, sin, value=-sign)
    right.addcmul_(a, sin, value=sign)
    return out.flatten(-2).to(x.dtype)


def _viewable_as_complex(x: Tensor) -> bool:
    """反向来的梯度可以是任意步长的（例如 sum 的，步长为 0）。"""
    *outer, last = x.stride()
    return last == 1 and not any(n % 2 for n in (*outer, x.storage_offset()))


def _turn_fused(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """同一式子的函数式写法：inductor 自会融成一遍，而它不会编译复数。"""
    a, b = x.unflatten(-1, (2, -1) if dim == -2 else (-1, 2)).unbind(dim)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim).flatten(-2).to(x.dtype)


class _Turn(torch.autograd.Function):
    """旋转的导数就是往回转：反向与前向一样便宜，且只存两张小表，不存 x。"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, dim: int, sign: float) -> Tensor:
        return _turn_plain(x, cos, sin, dim, sign)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.dim, ctx.sign = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _Turn.apply(grads[0], cos, sin, ctx.dim, -ctx.sign), None, None, None, None

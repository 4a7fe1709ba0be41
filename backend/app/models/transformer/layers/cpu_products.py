"""F.linear 在 CPU 上的几种写法：很少几行时，与乘法很大时。

逐个词元解码时时间全在读权重上，F.linear 的内核却为大矩阵而造。三种写法各管一段行数，
都只把同样的乘加换个次序；测量与别的做法见 docs/decisions/002-few-row-products.md。
R 行数、I 输入宽、O 输出宽。
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW_ROWS = 64
# 乘加次数；再小，Python 里的 autograd 函数的开销就吃掉所得。
LARGE = 3 * 10**8
_FOUR = 4
_GROUPS = 8
_DTYPES = (torch.float32, torch.float64)


def cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (..., I)、weight (O, I) -> (..., O)；None = 这里 F.linear 就最快。"""
    if _few_rows(x, weight):
        y = few_row_product(x.reshape(-1, x.shape[-1]), weight)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    if _large(x, weight):
        large: Tensor = _Large.apply(x, weight, bias)
        return large
    return None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, I) 与 weight (O, I) -> (R, O)，不求梯度：行数远少于 O，AVX2 上也是 oneDNN 快。"""
    if _few_rows(x, weight):
        return few_row_product(x, weight)
    return _onednn(x, weight, None) if _large(x, weight, "AVX2") else F.linear(x, weight)


class _Large(torch.autograd.Function):
    """F.linear 的大乘法：前向与输入的梯度交给 oneDNN，权重的梯度 MKL 更快。"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _onednn(grad, weight.t(), None) if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _large(x: Tensor, weight: Tensor, *also: str) -> bool:
    """oneDNN 的乘法比 F.linear（MKL）快的时候：有 AVX-512（或 also）的 CPU，float32，乘法够大。"""
    return (
        x.numel() * weight.shape[0] >= LARGE
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _vectors() in ("AVX512", *also)
    )


@cache
def _vectors() -> str | None:
    """这个 CPU 的向量指令集；None = torch 没有带 oneDNN。"""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.backends.cpu.get_cpu_capability()
    return None


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    """只在不求梯度的 CPU float32/64 上；编译与导出时形状是符号，留给编译器。"""
    return (
        not torch.is_grad_enabled()
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in _DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def few_row_product(x: Tensor, weight: Tensor) -> Tensor:
    """(R, I) 与 (O, I) -> (R, O)，末维连续：不连续会让后面的 SDPA 落到慢的数学路径上。"""
    if x.shape[0] == 1:
        return _one_row(x, weight)
    if x.shape[0] <= _FOUR or x.dtype != torch.float32:
        return torch.mm(weight, x.t()).t().contiguous()
    return _as_convolution(x, weight)


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """按输出行分组的 bmm：各线程各读一段权重；F.linear 在这里只用一个线程。"""
    out = weight.shape[0] - weight.shape[0] % _GROUPS
    blocks = weight[:out].view(_GROUPS, out // _GROUPS, weight.shape[1])
    y = torch.bmm(blocks, x.t().expand(_GROUPS, -1, -1)).view(1, out)
    if out == weight.shape[0]:
        return y
    return torch.cat([y, torch.mm(weight[out:], x.t()).t()], 1)


def _as_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """把权重当作 channels-last 的图像（O 个像素、I 个通道），x 当作 R 个 1x1 卷积核。

    oneDNN 的卷积内核不重排图像，而矩阵乘的内核每次都要重排整个权重。
    """
    image = weight.view(1, weight.shape[0], 1, weight.shape[1]).permute(0, 3, 1, 2)
    y = F.conv2d(image, x[:, :, None, None])  # (1, R, O, 1)
    return y.view(x.shape[0], weight.shape[0]).contiguous()

"""线性层：权重就是 nn.Linear 的权重，只有在 CPU 上算很少几行时换一种乘法。

逐个词元解码时时间全在读权重上，F.linear 的内核却为大矩阵而造。三种写法各管一段行数，
都只把同样的乘加换个次序；测量与别的做法见 docs/decisions/002-few-row-products.md。
R 行数、I 输入宽、O 输出宽。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 64
_FOUR = 4
_GROUPS = 8
_DTYPES = (torch.float32, torch.float64)


class Linear(nn.Linear):
    """nn.Linear；初始化统一在 init.py，构造时不做。"""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in)、weight (out, in) -> (..., out)，等于 F.linear。"""
    if _few_rows(x, weight):
        y = _few_row_product(x.reshape(-1, x.shape[-1]), weight)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


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


def _few_row_product(x: Tensor, weight: Tensor) -> Tensor:
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

"""线性层：权重就是 nn.Linear 的权重，只有在 CPU 上算很少几行时换一种乘法。

逐个记号解码时时间全在读权重上。F.linear 把只有一行的乘法交给单线程的 gemv；
把权重按输出行分组成一个 bmm，各线程各读一段，才接近内存带宽。
2 到 FEW_ROWS 行时把权重放在左边的 mm 更快。测量见 docs/decisions/002-few-row-products.md。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 32
_GROUPS = 8


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
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
    )


def _few_row_product(x: Tensor, weight: Tensor) -> Tensor:
    """(R, in) 与 (out, in) -> (R, out)。"""
    if x.shape[0] > 1:
        # 末维不连续会让后面的 SDPA 落到慢的数学路径上。
        return torch.mm(weight, x.t()).t().contiguous()
    out = weight.shape[0] - weight.shape[0] % _GROUPS
    blocks = weight[:out].view(_GROUPS, out // _GROUPS, weight.shape[1])
    y = torch.bmm(blocks, x.t().expand(_GROUPS, -1, -1)).view(1, out)
    if out == weight.shape[0]:
        return y
    return torch.cat([y, torch.mm(weight[out:], x.t()).t()], 1)

"""线性层：就是 nn.Linear；在 CPU 上有时换一种乘法，见 cpu_products.py。"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_products import cpu_linear


class Linear(nn.Linear):
    """初始化统一在 init.py，构造时不做。"""

    init_std: float | None = None

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in)、weight (out, in) -> (..., out)，等于 F.linear。"""
    y = cpu_linear(x, weight, bias)
    return F.linear(x, weight, bias) if y is None else y

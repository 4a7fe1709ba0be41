"""量化的叶子：与 Linear、GroupedLinear、Embedding 同样的用法，权重换成码。

R 行数、I 输入宽、O 输出宽、E 专家数。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .codes import Codes
from .matrix import QuantizedMatrix, QuantizedStack


class QuantizedLinear(nn.Module):
    """Linear 的量化：bias 仍是浮点。"""

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = QuantizedMatrix(codes)
        self.bias = _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)。"""
        return self.weight.product(x, self.bias)


class QuantizedEmbedding(nn.Module):
    """词元的查表；weight 同时是共享的输出头，只存一份。"""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.weight = QuantizedMatrix(codes)

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., I) float32。"""
        return self.weight.rows(ids)


class QuantizedGroupedLinear(nn.Module):
    """GroupedLinear 的量化：weight (E, O, I) 的码，bias (E, O)。"""

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = QuantizedStack(codes)
        self.bias = _frozen(bias)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (R, I)，行已按专家排好，专家 e 的行到 ends[e] 为止 -> (R, O)；其后的行是零。"""
        y = x.new_zeros(x.shape[0], self.weight.shape[1])
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                y[start:end] = self.one(expert, x[start:end])
            start = end
        return y

    def one(self, expert: int, x: Tensor) -> Tensor:
        """一个专家的 (R, I) -> (R, O)。"""
        return self.weight.product(expert, x, None if self.bias is None else self.bias[expert])


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().to(torch.float32), False)

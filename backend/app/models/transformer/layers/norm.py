"""归一化层的选择。LayerNorm 的 eps 取 GPT-2 的 1e-5。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import GPT2Config, NormType

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """autocast 之下输入是 bfloat16、增益是 float32；类型不同时 torch 报警，融合的算子也用不上。"""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class Kind:
    """一种归一化。

    Attributes:
        make: (宽度, 有没有偏置) -> 模块。
        biased: 听 config.bias 的话。
        saved: 宽度 -> 反向在输入之外为每个词元记下几个数。
    """

    make: Callable[[int, bool], nn.Module]
    biased: bool
    saved: Callable[[int], int]


NORMS: dict[NormType, Kind] = {
    # 均值与标准差的倒数。
    "layernorm": Kind(lambda n, bias: nn.LayerNorm(n, eps=EPS, bias=bias), True, lambda n: 2),
    # 标准差的倒数，与乘增益之前的结果。
    "rmsnorm": Kind(lambda n, bias: RMSNorm(n), False, lambda n: 1 + n),
}


def make_norm(config: GPT2Config) -> nn.Module:
    return NORMS[config.norm_type].make(config.n_embed, config.bias)

"""前馈层。默认是 GPT-2 的 GELU，tanh 近似式（gelu_new）；用 erf 式跑 tanh 式的权重会悄悄出偏差。"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .config import Activation, GPT2Config
from .layers.fused import feed_forward_parts
from .layers.linear import Linear


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """ReLU²（So et al. 2021, Primer, arXiv:2109.08668）。"""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """(..., 2h) -> (..., h)：前一半过 SiLU 作门（Shazeer 2020, arXiv:2002.05202）。"""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# 有门的把最后一维减半；哪些有门在 config.GATED。
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": F.gelu,
    # OPT 的激活。
    "relu": F.relu,
    "relu2": relu2,
    "swiglu": swiglu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """hidden：中间的宽度，默认 config.mlp_hidden。"""

    def __init__(self, config: GPT2Config, hidden: int | None = None) -> None:
        super().__init__()
        hidden = config.mlp_hidden if hidden is None else hidden
        rows = sum(feed_forward_parts(config, hidden).values())
        self.c_fc = Linear(config.n_embed, rows, bias=config.bias)
        self.c_proj = Linear(hidden, config.n_embed, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)。"""
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))

"""归一化层的选择。LayerNorm 的 eps 取 GPT-2 的 1e-5。"""

from __future__ import annotations

from torch import nn

from ..config import GPT2Config

EPS = 1e-5


def make_norm(config: GPT2Config) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return nn.RMSNorm(config.n_embed, eps=EPS)
    return nn.LayerNorm(config.n_embed, eps=EPS, bias=config.bias)

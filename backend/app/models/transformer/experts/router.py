"""路由器：每个词元挑 k 个专家并给出权重。

N 词元数、C 宽度、E 专家数、k 每个词元的专家数。打分总在 float32 以上：Switch 的路由器全用
bfloat16 时发散，只把路由器换成 float32 就好（Fedus et al. 2021, arXiv:2101.03961, 表 2）。
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPT2Config
from ..settings.moe_config import Router as Kind

# 打分起初要小而各不相同：大了一开始就偏，全零则次次选前 k 号。
ROUTER_STD = 0.006


class Choice(NamedTuple):
    """expert (N, k) int64；weight (N, k)；share (N, E) 每行和为 1 的分数；logits (N, E)。"""

    expert: Tensor
    weight: Tensor
    share: Tensor
    logits: Tensor


class Router(nn.Module):
    """weight (E, C)，没有偏置。

    selection_bias (E,) 只有 sigmoid 有：只参与挑选，不进权重，也没有梯度；训练循环每步更新一次
    （Wang et al. 2024, arXiv:2408.15664）。它随权重一起存取。
    """

    init_std = ROUTER_STD
    selection_bias: Tensor | None

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.kind: Kind = config.moe.router
        self.top_k, self.jitter = config.moe_top_k, config.moe.jitter_noise
        self.weight = nn.Parameter(torch.empty(config.moe_num_experts, config.n_embed))
        bias = torch.zeros(config.moe_num_experts) if self.kind == "sigmoid" else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x: Tensor) -> Choice:
        """x (N, C)。"""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.to(wide)
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = F.linear(x, self.weight.to(wide))
            return choose(self.kind, logits, self.top_k, self.selection_bias)


def choose(kind: Kind, logits: Tensor, k: int, bias: Tensor | None = None) -> Choice:
    """
    softmax_topk  p = softmax；前 k 个再归一      Mixtral（arXiv:2401.04088）
    softmax       p = softmax；前 k 个原样        OLMoE（arXiv:2409.02060）
    switch        同上，k = 1                     Switch（arXiv:2101.03961）
    sigmoid       s = sigmoid；按 s + bias 挑，s 归一   DeepSeek-V3（arXiv:2412.19437）
    """
    if kind == "sigmoid":
        score = logits.sigmoid()
        share = score / score.sum(-1, keepdim=True)
        ranked = score if bias is None else score + bias
        expert = ranked.topk(k, dim=-1).indices
        weight = score.gather(-1, expert)
    else:
        score = share = logits.softmax(-1)
        weight, expert = score.topk(k, dim=-1)
    if kind in ("softmax_topk", "sigmoid"):
        weight = weight / weight.sum(-1, keepdim=True)
    return Choice(expert, weight, share, logits)

"""路由器：每个词元挑 k 个专家并给出权重；均衡的几种损失。

N 词元数、C 宽度、E 专家数、k 每个词元的专家数。打分总在 float32 以上：Switch 的路由器全用
bfloat16 时发散，只把路由器换成 float32 就好（Fedus et al. 2021, arXiv:2101.03961, 表 2）。
"""

from __future__ import annotations

import math
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


def balance_loss(load: Tensor, share: Tensor, real: Tensor | None) -> Tensor:
    """E·Σ f·P：f 每个专家分到的对数 / 词元数（和为 k），P 平均分数。均匀时是 k。

    k = 1 即 Switch 的式 4；k > 1 与 transformers 的 Mixtral 同一约定。f 没有梯度。
    load (E,)；share (N, E)；real (N,)：不是填充的词元，None = 全部。
    """
    n = _count(share, real)
    mean = _mean(share, real, n)
    return share.shape[1] * (load.to(mean.dtype) / n * mean).sum()


def z_loss(logits: Tensor, real: Tensor | None) -> Tensor:
    """logsumexp² 的平均：不让打分越长越大（Zoph et al. 2022, ST-MoE, arXiv:2202.08906, 式 5）。"""
    square = logits.logsumexp(-1).square()
    return _mean(square[:, None], real, _count(logits, real)).squeeze(0)


def capacity(factor: float, real: Tensor | None, tokens: int, k: int, experts: int) -> Tensor | int:
    """一个专家至多收几个：ceil(factor·N·k/E)，填充不算。"""
    if real is None:
        return math.ceil(factor * tokens * k / experts)
    return (real.sum().double() * factor * k / experts).ceil().long()


def _count(values: Tensor, real: Tensor | None) -> Tensor | int:
    """至少 1：一行都是填充时不除以零。"""
    return values.shape[0] if real is None else real.sum().clamp(min=1)


def _mean(values: Tensor, real: Tensor | None, n: Tensor | int) -> Tensor:
    """(N, ...) -> (...)，只数真词元。"""
    if real is not None:
        values = values.masked_fill(~real[:, None], 0.0)
    return values.sum(0) / n

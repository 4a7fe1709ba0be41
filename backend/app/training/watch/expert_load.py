"""专家的负载：每步更新一次的无损失均衡，与记进 metrics 的几个数。

M 个 MoE 层、E 专家数。
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.experts.router import Router


@torch.no_grad()
def update_selection_bias(model: GPT2Model, load: Tensor) -> None:
    """b += u·sign(平均负载 - 负载)（Wang et al. 2024, arXiv:2408.15664, 算法 1）。

    load (M, E)：整步各微批之和。每个优化器步只调用一次，所以与微批怎样切、激活是否重算无关。
    """
    rate = model.config.moe.bias_update_rate
    if not rate:
        return
    for layer, one in zip(model.config.moe_layers, load.double(), strict=True):
        # 流水线的一个 rank 只有其中几层。
        if str(layer) not in model.h:
            continue
        router = model.get_submodule(f"h.{layer}.mlp.router")
        assert isinstance(router, Router) and router.selection_bias is not None
        # 冻结的层连偏置也不动：适配器的检查点里没有它，动了就再也找不回。
        if not router.weight.requires_grad:
            continue
        step = rate * torch.sign(one.mean() - one)
        router.selection_bias += step.to(router.selection_bias.dtype)


def balance_row(layers: tuple[int, ...], load: Tensor, dropped: Tensor) -> dict[str, Any]:
    """{层号: 一步的负载}；load (M, E)、dropped (M,)，与设备只同步一次。"""
    table = torch.cat([load, dropped[:, None]], 1).tolist()
    return {
        str(layer): layer_balance(counts, lost)
        for layer, (*counts, lost) in zip(layers, table, strict=True)
    }


def layer_balance(load: list[int], dropped: int) -> dict[str, Any]:
    """一层。

    load 各专家分到的份额；max_vio = 最忙的 / 平均 - 1（同上，式 4）；entropy 份额的熵除以 ln E，
    均匀是 1；drop_rate 丢掉的份额；dead 这一步一个词元也没有的专家数。
    """
    total = sum(load)
    share = [n / total if total else 0.0 for n in load]
    entropy = -sum(p * math.log(p) for p in share if p) / math.log(len(load))
    return {
        "load": [round(p, 6) for p in share],
        "max_vio": max(share) * len(load) - 1 if total else 0.0,
        "entropy": entropy,
        "drop_rate": dropped / total if total else 0.0,
        "dead": load.count(0),
    }

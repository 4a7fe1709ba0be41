"""AdamW 的参数分组：矩阵衰减，增益与偏置不衰减（GPT-3, arXiv:2005.14165 附录 B 的做法）。"""

from __future__ import annotations

import torch
from torch import nn

from .config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """两组：ndim >= 2 的衰减，其余不衰减。

    共享的权重（绑定的词嵌入）由 named_parameters 去重，只出现一次。
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for _, p in named if p.ndim >= 2],
            "names": [name for name, p in named if p.ndim >= 2],
            "weight_decay": weight_decay,
        },
        {
            "params": [p for _, p in named if p.ndim < 2],
            "names": [name for name, p in named if p.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> tuple[torch.optim.AdamW, str]:
    """(优化器, 一句话说明选了哪种实现)。"""
    devices = {p.device.type for p in model.parameters()}
    fused = devices <= {"cpu", "cuda"}
    why = "fused AdamW" if fused else f"AdamW, not fused on {', '.join(sorted(devices))}"
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )
    return optimizer, why

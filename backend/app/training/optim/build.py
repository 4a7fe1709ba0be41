"""优化器与参数分组：矩阵衰减，增益与偏置不衰减（GPT-3, arXiv:2005.14165 附录 B 的做法）。"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.fused import parts_of

from ..config import OptimConfig
from .muon import MuonAdamW

_ROUTER = ".router.weight"
_Named = list[tuple[str, nn.Parameter]]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """两组：矩阵衰减，其余（叠起来的专家的偏置也是）不衰减。

    共享的权重（绑定的词嵌入）由 named_parameters 去重，只出现一次。
    """
    return _by_decay(_trainable(model), weight_decay)


def build_optimizer(model: GPT2Model, config: OptimConfig) -> tuple[torch.optim.Optimizer, str]:
    """(优化器, 一句话说明选了哪种实现)；各组的 initial_lr 是学习率的峰值。

    name="muon"：各块里的矩阵用 Muon，叠起来的专家各自正交化；词嵌入、位置嵌入、不共享的输出头是
    查表，每步只动几行，正交化没有意义；路由器每行是一个专家的打分，正交化会逼着冷热不同的专家走一样
    大的步。它们与增益、偏置一起仍用 AdamW。
    """
    devices = {p.device.type for p in model.parameters()}
    fused = devices <= {"cpu", "cuda"}
    why = "fused AdamW" if fused else f"AdamW, not fused on {', '.join(sorted(devices))}"
    named = _trainable(model)
    matrices = [
        (n, p)
        for n, p in named
        if n.startswith("h.") and _is_matrix(n, p) and not n.endswith(_ROUTER)
    ]
    if config.name == "adamw" or not matrices:
        matrices = []
    taken = {name for name, _ in matrices}
    adamw = torch.optim.AdamW(
        _by_decay([(n, p) for n, p in named if n not in taken], config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )
    optimizer: torch.optim.Optimizer = adamw
    if matrices:
        group = _muon_group(matrices, model.config, config)
        optimizer = MuonAdamW(group, adamw)
        why = f"Muon for {len(matrices)} matrices (peak lr {group['lr']:g}), {why} for the rest"
    for each in optimizer.param_groups:
        each["initial_lr"] = each["lr"]
    return optimizer, why


def _trainable(model: nn.Module) -> _Named:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _by_decay(named: _Named, weight_decay: float) -> list[dict[str, object]]:
    groups = [
        {
            "params": [p for name, p in named if _is_matrix(name, p)],
            "names": [name for name, p in named if _is_matrix(name, p)],
            "weight_decay": weight_decay,
        },
        {
            "params": [p for name, p in named if not _is_matrix(name, p)],
            "names": [name for name, p in named if not _is_matrix(name, p)],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith(".bias")


def _muon_group(named: _Named, shape: GPT2Config, config: OptimConfig) -> dict[str, Any]:
    return {
        "params": [p for _, p in named],
        "names": [name for name, _ in named],
        "parts": [_parts(name, p, shape) for name, p in named],
        "lr": config.lr if config.muon_lr is None else config.muon_lr,
        "weight_decay": config.weight_decay,
    }


def _parts(name: str, parameter: nn.Parameter, shape: GPT2Config) -> list[int]:
    """融合的矩阵由哪几块叠成（各块的行数）；muon.py 说明为什么分开。E 个专家是 E 份。"""
    rows, experts = parameter.shape[-2], len(parameter) if parameter.ndim == 3 else 1
    return experts * list(parts_of(name, rows, shape).values())

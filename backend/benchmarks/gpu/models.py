"""核对用的模型：设备上的与它在 CPU 上的 float64 孪生；尺寸与一批词元。

B 行、T 词元数、V 词表。
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.config import MoEConfig, RoPEConfig

# 每项换掉一个部件。
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {"norm": "pre"},
    "post": {"norm": "post"},
    "deepnorm": {"norm": "deepnorm"},
    "keel": {"norm": "keel"},
    "rope, qk_norm, relu2": {"position": "rope", "qk_norm": True, "activation": "relu2"},
    "interleaved rope": {"position": "rope", "rope": RoPEConfig(layout="interleaved")},
    "grouped keys, swiglu, rmsnorm": {
        "n_kv_head": 2, "activation": "swiglu", "norm_type": "rmsnorm", "bias": False,
    },
    "local(20)|global(3)": {"attention_pattern": "local(20) | global(3)"},
    "experts": {"moe_num_experts": 4, "moe": MoEConfig(router="sigmoid", shared_experts=1)},
}  # fmt: skip


def shape(**changes: Any) -> GPT2Config:
    """头宽 32：FlexAttention 的核要 16 以上。"""
    values: dict[str, Any] = {
        "vocab_size": 211, "context_size": 96, "n_layer": 3, "n_head": 4, "n_embed": 128,
        "dropout": 0.0, "norm": "pre",
    }  # fmt: skip
    return GPT2Config(**(values | changes))


def tiny(**changes: Any) -> GPT2Config:
    return shape(**({"context_size": 32, "n_layer": 2, "n_embed": 64, "n_head": 4} | changes))


def pair(config: GPT2Config, device: torch.device) -> tuple[GPT2Model, GPT2Model]:
    """(设备上的 float32, CPU 上的 float64)，权重相同。"""
    torch.manual_seed(0)
    model = GPT2Model(config)
    return copy.deepcopy(model).to(device), model.double()


def ids(rows: int, length: int, vocab: int, seed: int = 1) -> Tensor:
    """(B, T)，在 CPU 上。"""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (rows, length), generator=source)


def gradients(model: GPT2Model) -> Tensor:
    """全部梯度接成一串。"""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

"""小而各开关齐全的模型，供数值测试。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.config import MoEConfig, RoPEConfig

NORMS = ("post", "pre", "deepnorm", "keel")
# 每项一个开关，换掉默认的一个部件；数值性质对每一项都要成立。
VARIANTS: dict[str, dict[str, Any]] = {
    **{norm: {"norm": norm} for norm in NORMS},
    "rmsnorm": {"norm_type": "rmsnorm", "norm": "pre"},
    "no position": {"position": "none"},
    "untied": {"tie_weights": False},
    "grouped": {"n_kv_head": 2},
    "multi-query": {"n_kv_head": 1, "norm": "pre"},
    "swiglu": {"activation": "swiglu", "bias": False},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "silu": {"activation": "silu"},
    "gelu": {"activation": "gelu"},
    "qk_norm": {"qk_norm": True},
    "reference": {"attention_backend": "reference"},
    "local": {"attention_pattern": "local(5)"},
    "local+global": {"attention_pattern": "local(4) | global(2)"},
    "strided": {"attention_pattern": "strided(3)"},
    "local+strided": {"attention_pattern": "local(3) | strided(4)"},
    "fixed": {"attention_pattern": "fixed(5, 2)"},
    "longformer": {"attention_pattern": "longformer(3, 2, 2)"},
    "sinks": {"attention_pattern": "sinks(2, 5)", "position": "none"},
    "cycle": {"attention_pattern": ("local(4)", "causal"), "norm": "pre"},
    "rope": {"position": "rope"},
    "rope interleaved + sinks": {
        "position": "rope",
        "rope": RoPEConfig(layout="interleaved"),
        "attention_pattern": "sinks(2, 5)",
        "n_kv_head": 2,
    },
    "blocked": {"attention_pattern": "local(4) | global(2)", "attention_backend": "blocked"},
    "moe": {"moe_num_experts": 4},
    "moe swiglu rope": {
        "moe_num_experts": 5,
        "moe": MoEConfig(router="sigmoid", shared_experts=1, first_dense=1),
        "activation": "swiglu",
        "position": "rope",
        "norm": "keel",
    },
    "moe switch": {
        "moe_num_experts": 3,
        "moe_top_k": 1,
        "moe": MoEConfig(router="switch", every=2, hidden=16),
        "norm": "pre",
        "bias": False,
        "attention_pattern": "local(4) | global(2)",
    },
    "blocked fold": {"attention_pattern": "local(3) | strided(4)", "attention_backend": "blocked"},
}


def steady(changes: dict[str, Any]) -> dict[str, Any]:
    """给要求逐位相同的测试：有专家的换成参考分派。

    别的分派里一个专家有几行要看其余的词元，矩阵乘换了形状，末位就可能不同；它们与参考分派的差
    另有测试（1e-12）。
    """
    if "moe_num_experts" not in changes:
        return changes
    return changes | {"moe": replace(changes.get("moe", MoEConfig()), dispatch="reference")}


def tiny_config(**changes: Any) -> GPT2Config:
    base: dict[str, Any] = {
        "vocab_size": 37, "context_size": 24, "n_layer": 3, "n_head": 4, "n_embed": 32,
    }  # fmt: skip
    return GPT2Config(**{**base, **changes})


def tiny_model(dtype: torch.dtype = torch.float64, scale: float = 3.0, **changes: Any) -> GPT2Model:
    """权重乘 scale：刚初始化的模型太平滑，错误会小得看不见。"""
    model = GPT2Model(tiny_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, vocab: int = 37) -> Tensor:
    return torch.randint(0, vocab, shape)


def relative(a: Tensor, b: Tensor) -> float:
    """最大差相对于 b 的最大值。"""
    return ((a - b).abs().max() / b.abs().max()).item()


# 每种路由器一个：GPT2Config 的字段。
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax_topk": {},
    "softmax": {"moe": MoEConfig(router="softmax")},
    "sigmoid": {"moe": MoEConfig(router="sigmoid")},
    "switch": {"moe": MoEConfig(router="switch"), "moe_top_k": 1},
}
MIXED: dict[str, Any] = {"moe_num_experts": 4}

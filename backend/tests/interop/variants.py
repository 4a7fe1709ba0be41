"""一组小模型，合起来走遍每个开关；权重放大，好让贪心的文字不单调、错误看得见。"""

from __future__ import annotations

from typing import Any

import torch

from app.models.transformer import GPT2Config, GPT2Model

VOCAB, CONTEXT = 61, 48

VARIANTS: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm": "pre"},
    "deepnorm rope gqa": {"norm": "deepnorm", "position": "rope", "n_kv_head": 2},
    "keel qk_norm no positions": {"norm": "keel", "qk_norm": True, "position": "none"},
    "untied rmsnorm swiglu": {
        "tie_weights": False, "norm_type": "rmsnorm", "bias": False, "activation": "swiglu",
    },
    "prefix and window": {"norm": "pre", "attention_pattern": "local(5) | global(3)"},
    "window and causal": {"position": "rope", "attention_pattern": ("local(6)", "causal")},
    "experts": {"norm": "pre", "moe_num_experts": 4},
    "experts sigmoid": {
        "norm": "keel", "position": "rope", "activation": "swiglu", "bias": False,
        "moe_num_experts": 4,
        "moe": {"router": "sigmoid", "shared_experts": 1, "first_dense": 1},
    },
    "strided gqa": {"n_kv_head": 1, "attention_pattern": "local(3) | strided(4)"},
}  # fmt: skip


def config(name: str, **changes: Any) -> GPT2Config:
    fields = {
        "vocab_size": VOCAB, "context_size": CONTEXT, "n_layer": 2, "n_head": 4, "n_embed": 32,
        "dropout": 0.0, **VARIANTS[name], **changes,
    }  # fmt: skip
    return GPT2Config.from_dict(fields)


def model(name: str, **changes: Any) -> GPT2Model:
    """float64，eval。"""
    torch.manual_seed(1)
    made = GPT2Model(config(name, **changes)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """没有 0：它是填充，generate 会从输入里认出它来。"""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

"""Mixtral 的 config.json 里成组的设置（RoPE、专家）与我们的互换；其余照 families.py 的表。"""

from __future__ import annotations

from typing import Any

from ..config import GPT2Config
from ..settings.fields import short
from ..settings.moe_config import MoEConfig
from ..settings.rope_config import RoPEConfig


def read_mixtral(raw: dict[str, Any]) -> dict[str, Any]:
    """对方的 config.json -> 我们成组的设置。

    transformers 5 把 RoPE 写在 rope_parameters 里，此前是 rope_theta 与 rope_scaling。

    Raises:
        ValueError: 拉伸过的位置，或与宽度不合的头。
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise ValueError(
            f"rope_type={short(kind)} means scaled rotary positions; mixtral is read "
            "with rope_type='default' only"
        )
    width, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    given = raw.get("head_dim")
    if given is not None and given * heads != width:
        raise ValueError(
            f"head_dim={short(given)} but hidden_size={short(width)} / "
            f"num_attention_heads={short(heads)}: only heads that share the width can be read"
        )
    return {
        "rope": RoPEConfig(theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e6)))),
        "moe": MoEConfig(
            hidden=raw.get("intermediate_size", 14336),
            aux_loss_coef=float(raw.get("router_aux_loss_coef", 0.001)),
            z_loss_coef=0.0,
            jitter_noise=float(raw.get("router_jitter_noise", 0.0)),
        ),
    }


def write_mixtral(config: GPT2Config) -> dict[str, Any]:
    """read_mixtral 的逆，不查 not_mixtral。"""
    return {
        "intermediate_size": config.expert_hidden,
        "router_aux_loss_coef": config.moe.aux_loss_coef,
        "router_jitter_noise": config.moe.jitter_noise,
        "rope_theta": config.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "head_dim": config.head_dim,
    }


def not_mixtral(config: GPT2Config) -> str | None:
    """成组的设置为什么写不成 Mixtral；None = 写得成。"""
    moe, rope = config.moe, config.rope
    if moe.router != "softmax_topk":
        return f"moe.router={moe.router!r} but mixtral has only moe.router='softmax_topk'"
    if moe.shared_experts:
        return f"moe.shared_experts={moe.shared_experts} but mixtral has only moe.shared_experts=0"
    if config.moe_layers != tuple(range(config.n_layer)):
        return f"experts in layers {list(config.moe_layers)} but mixtral has them in every layer"
    if rope != RoPEConfig(theta=rope.theta):
        return f"rope={rope} but mixtral has plain rotary positions, layout 'half'"
    return None

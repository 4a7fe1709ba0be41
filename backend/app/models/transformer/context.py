"""一次前向里各层共用的东西：坐标、掩码计划、缓存的一步。层的签名因此总是 (x, ctx)。"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .cache import Step
from .config import GPT2Config
from .pattern import Pattern
from .plan import MaskPlan
from .positions import Positions
from .rope import Rotary


class KeyValues(Protocol):
    """层只认这一件事：写入新的 k/v (B, G, T, D)，拿回应当去看的全部 (B, G, S, D)。"""

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Context:
    """plans 每层一个（同一图样的层共用）；rotary 只在 position='rope' 时有。

    maps 收集被点名的层的注意力图 {层: (B, H, Tq, Tk)}；want_maps 是点名的层。
    """

    positions: Positions
    plans: tuple[MaskPlan, ...]
    rotary: Rotary | None = None
    step: KeyValues | None = None
    want_maps: frozenset[int] = frozenset()
    maps: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        config: GPT2Config,
        patterns: tuple[Pattern, ...],
        where: Positions,
        step: Step | None = None,
        *,
        dtype: torch.dtype,
        training: bool,
        want_maps: frozenset[int] = frozenset(),
    ) -> Context:
        """每种图样只备一次。patterns 每层一个（config.patterns 每次都要解析，所以由模型带着）。"""
        plans = {
            pattern: MaskPlan.build(
                where,
                where if step is None else step.keys(pattern),
                pattern,
                asked=config.attention_backend,
                dtype=dtype,
                head_dim=config.head_dim,
                dropout=config.dropout if training else 0.0,
                grad=torch.is_grad_enabled(),
            )
            for pattern in dict.fromkeys(patterns)
        }
        rotary = rotation(config, where, dtype)
        return cls(where, tuple(plans[p] for p in patterns), rotary, step, want_maps)


def rotation(config: GPT2Config, where: Positions, dtype: torch.dtype) -> Rotary | None:
    """position='rope' 时这些位置的旋转。"""
    if config.position != "rope":
        return None
    return Rotary.at(where.pos, config.rope, config.head_dim, config.context_size, dtype)

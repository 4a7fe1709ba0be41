"""一次前向里各层共用的东西：坐标、掩码计划、缓存的一步。层的签名因此总是 (x, ctx)。"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..backends.mask_plan import MaskPlan
from ..cache.kv_cache import Step
from ..config import GPT2Config
from ..visibility.pattern import Pattern
from ..visibility.positions import Positions
from .rope import Rotary


class KeyValues(Protocol):
    """层只认这一件事：写入新的 k/v (B, G, T, D)，拿回应当去看的全部 (B, G, S, D)。"""

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Load:
    """一个 MoE 层这一次的负载，填充不算。

    Attributes:
        load: (E,) int64，挑中每个专家的 (词元, 专家) 对数，丢弃之前。
        dropped: 标量 int64，超出容量而丢掉的对数。
        balance, z: 标量，没有乘系数的均衡损失与 z 损失。
    """

    load: Tensor
    dropped: Tensor
    balance: Tensor
    z: Tensor


@dataclass(frozen=True)
class Context:
    """plans 每层一个（同一图样的层共用）；rotary 只在 position='rope' 时有。

    maps 收集被点名的层的注意力图 {层: (B, H, Tq, Tk)}；want_maps 是点名的层。
    loads 收集各层的负载，键是 "load"，只有 MoE 层写；routing 收集被点名的层的 (专家, 权重)，各
    (B, T, k)，专家 E = 没有去任何专家。重算激活时同一层写两遍也是同样的值。
    layer、plan、want_map、want_route、load 只在 at(layer) 给这一层的里面有意义。层号若存在层里，
    或作为字典的键，逐块编译时每层都要另编一次，到第八层就不再编译了。
    """

    positions: Positions
    plans: tuple[MaskPlan, ...]
    rotary: Rotary | None = None
    step: KeyValues | None = None
    want_maps: frozenset[int] = frozenset()
    maps: dict[int, Tensor] = field(default_factory=dict)
    want_loads: bool = False
    loads: dict[int, dict[str, Load]] = field(default_factory=dict)
    want_routing: frozenset[int] = frozenset()
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # 忘了 at 就越界报错，而不是悄悄当成最后一层。
    layer: int = 1 << 30
    want_map: bool = False
    want_route: bool = False
    load: dict[str, Load] = field(default_factory=dict)

    @property
    def plan(self) -> MaskPlan:
        return self.plans[0]

    def at(self, layer: int) -> Context:
        """第 layer 层看到的。"""
        load = self.loads[layer] = {}
        return replace(
            self,
            plans=self.plans[layer : layer + 1],
            layer=layer,
            want_map=layer in self.want_maps,
            want_route=layer in self.want_routing,
            load=load,
        )

    def expert_loads(self, config: GPT2Config) -> list[Load]:
        """各 MoE 层的，前向之后；要 want_loads。"""
        return [self.loads[i]["load"] for i in config.moe_layers]

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
        want_routing: frozenset[int] = frozenset(),
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
        return cls(
            where, tuple(plans[p] for p in patterns), rotary, step, want_maps,
            want_loads=step is None, want_routing=want_routing,
        )  # fmt: skip


def rotation(config: GPT2Config, where: Positions, dtype: torch.dtype) -> Rotary | None:
    """position='rope' 时这些位置的旋转。"""
    if config.position != "rope":
        return None
    return Rotary.at(where.pos, config.rope, config.head_dim, config.context_size, dtype)


def aux_loss(config: GPT2Config, loads: list[Load]) -> Tensor:
    """标量，已乘系数；取各层的平均，所以系数不随层数改变分量。"""
    moe = config.moe
    total = sum(moe.aux_loss_coef * one.balance + moe.z_loss_coef * one.z for one in loads)
    assert isinstance(total, Tensor)
    return total / len(loads)

"""一次前向里一层看到的：坐标、掩码计划、旋转、缓存的一步。层的签名因此总是 (x, ctx)。

B 批、T 词元数、H 查询头数、G 键值头数、S 键数、D 头宽、E 专家数、k 每个词元的专家数。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..backends.mask_plan import MaskPlan, Part
from ..cache.row_cache import RowStep
from ..config import GPT2Config
from ..visibility.pattern import Pattern
from ..visibility.positions import Positions
from .rope import Rotary

Wish = Literal["map", "routing", "load"]


class KeyValues(Protocol):
    """层只认这一件事：写入新的 k/v (B, G, T, D)，拿回应当去看的全部 (B, G, S, D)。"""

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class CacheKeys(KeyValues, Protocol):
    """图样为 pattern 的层里，write 返回的键的坐标，(B|1, S)。"""

    def keys(self, pattern: Pattern) -> Positions: ...


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


@dataclass
class Note:
    """一层在路上记下的；wishes 里没有的不记。重算激活时同一层写两遍，也是同样的值。

    Attributes:
        map: (B, H, T, S) 注意力图。
        routing: (专家, 权重)，各 (B, T, k)；专家 E = 没有去任何专家。
        load: 只有 MoE 层写。
    """

    wishes: frozenset[Wish] = frozenset()
    map: Tensor | None = None
    routing: tuple[Tensor, Tensor] | None = None
    load: Load | None = None


@dataclass(frozen=True)
class Context:
    """一层一个；坐标、计划、旋转与缓存的一步各层共用。

    layer 只在写缓存时用：层号若存在层里，或作为字典的键，逐块编译时每层都要另编一次，
    到第八层就不再编译了。
    """

    positions: Positions
    plan: MaskPlan
    note: Note
    layer: int = 0
    rotary: Rotary | None = None
    step: KeyValues | None = None


def build_contexts(
    config: GPT2Config,
    patterns: Sequence[Pattern],
    where: Positions,
    step: CacheKeys | None,
    notes: Sequence[Note],
    dtype: torch.dtype,
    training: bool,
) -> list[Context]:
    """每层一个；计划每种图样只备一次。patterns 每层一个（config.patterns 每次都要解析）。

    Raises:
        ValueError: 点名了全局词元而没有一层认得；点名的后端做不了这件事。
    """
    if where.marked is not None and not any(pattern.takes_marks for pattern in patterns):
        raise ValueError(
            "global_attention_mask was given but no layer has a longformer pattern "
            f"(attention_pattern={config.attention_pattern!r}): use longformer(window, n_global), "
            "or leave the mask out"
        )
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
    return [
        Context(where, plans[pattern], note, layer, rotary, step)
        for layer, (pattern, note) in enumerate(zip(patterns, notes, strict=True))
    ]


def build_row_contexts(
    config: GPT2Config,
    patterns: Sequence[Pattern],
    step: RowStep,
    notes: Sequence[Note],
    dtype: torch.dtype,
) -> list[Context]:
    """没有填充的一步：每个词元自成一行（N, 1），注意力按 step 说的各部分走。"""
    rotary = rotation(config, step.where, dtype)
    plans: dict[Pattern, MaskPlan] = {}
    for layer, pattern in enumerate(patterns):
        if pattern not in plans:
            parts = tuple(
                Part(
                    sight.tokens, sight.rows, sight.keys,
                    MaskPlan.build(
                        sight.q, sight.k, pattern, asked=config.attention_backend, dtype=dtype,
                        head_dim=config.head_dim,
                    ),
                )
                for sight in step.of_layer(layer)
            )  # fmt: skip
            where = step.where
            plans[pattern] = MaskPlan(where, where, pattern, "parts", "no padding", parts=parts)
    return [
        Context(step.where, plans[pattern], note, layer, rotary, step)
        for layer, (pattern, note) in enumerate(zip(patterns, notes, strict=True))
    ]


def rotation(config: GPT2Config, where: Positions, dtype: torch.dtype) -> Rotary | None:
    """position='rope' 时这些位置的旋转。"""
    if config.position != "rope":
        return None
    return Rotary.at(where.pos, config.rope, config.head_dim, config.context_size, dtype)


def make_notes(
    config: GPT2Config, maps: Sequence[int] = (), routing: Sequence[int] = (), loads: bool = True
) -> list[Note]:
    """每层一个：maps、routing 是点名的层；loads：MoE 层记负载。

    Raises:
        ValueError: 没有那一层，或它不是 MoE 层。
    """
    check_layers("return_attention", maps, config.n_layer - 1)
    for layer in routing:
        if layer not in config.moe_layers:
            raise ValueError(
                f"return_routing names layer {layer}, but the MoE layers are "
                f"{list(config.moe_layers)} (moe_num_experts={config.moe_num_experts})"
            )
    chosen: dict[Wish, Sequence[int]] = {
        "map": maps, "routing": routing, "load": config.moe_layers if loads else (),
    }  # fmt: skip
    return [
        Note(frozenset(wish for wish, layers in chosen.items() if layer in layers))
        for layer in range(config.n_layer)
    ]


def check_layers(name: str, layers: Sequence[int], last: int) -> None:
    """
    Raises:
        ValueError: 没有那一层。
    """
    for layer in layers:
        if not 0 <= layer <= last:
            raise ValueError(f"{name} names layer {layer}, but layers here go from 0 to {last}")

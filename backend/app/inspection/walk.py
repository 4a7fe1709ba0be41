"""逐个子层走一遍模型，路上记下要看的。用的就是模型自己的层与残差，所以结果与前向逐位相同。

T 词元数、C 宽度、N 层数、H 查询头数、k 每个词元的专家数。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Model
from app.models.transformer.block import Block, Residual
from app.models.transformer.layers.context import make_notes
from app.models.transformer.visibility.positions import Positions

from .attention import NotFinite
from .slices import Slice, Steps, attention_cost, feed_forward_cost


@dataclass(frozen=True)
class Walk:
    """路上记下的。

    Attributes:
        streams: N+1 个 (T, C)：嵌入之后，与每层之后的残差流，末尾归一化之前。
        attention, mlp: 每层一个 (T,)：这个分支加进去的向量有多长（L2）。
        maps: {层: (H, T, T)}。
        routing: {层: (专家 (T, k)，权重 (T, k))}。
    """

    streams: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    maps: dict[int, Tensor] = field(default_factory=dict)
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def walk(
    model: GPT2Model,
    ids: Sequence[int],
    maps: Sequence[int] = (),
    routing: Sequence[int] = (),
) -> Steps[Walk]:
    """一个子层一片。

    Raises:
        ValueError: 没有词元，超长，没有那一层，或模型还在训练状态（dropout 会掺进来）。
    """
    config, found = model.config, Walk()
    if model.training:
        raise ValueError("the model is in training mode, with dropout: call model.eval() first")
    if not 1 <= len(ids) <= config.context_size:
        raise ValueError(f"{len(ids)} tokens: give 1 to context_size={config.context_size} of them")
    notes = make_notes(config, maps, routing, loads=False)
    yield Slice(len(ids), config.n_embed)
    where = Positions.plain(0, len(ids), model.device)
    x = model.embed(torch.tensor([list(ids)], device=model.device), where)
    contexts = model.contexts(where, None, notes, x.dtype)
    found.streams.append(x[0])
    for layer, (block, ctx) in enumerate(zip(model.h.values(), contexts, strict=True)):
        assert isinstance(block, Block)
        around_attn, around_mlp = block.residuals
        yield Slice(len(ids), attention_cost(config, len(ids)))
        attend = partial(block.attn, ctx=ctx)
        x, added = _through(around_attn, x, attend, block.ln_1, block.ln_1_post)
        found.attention.append(lengths(added[0]))
        yield Slice(len(ids), feed_forward_cost(config, layer))
        feed = partial(block.feed_forward, ctx=ctx)
        x, added = _through(around_mlp, x, feed, block.ln_2, block.ln_2_post)
        found.mlp.append(lengths(added[0]))
        found.streams.append(x[0])
        if ctx.note.map is not None:
            found.maps[layer] = ctx.plan.in_order(ctx.note.map)[0]
        if ctx.note.routing is not None:
            expert, weight = ctx.note.routing
            found.routing[layer] = expert[0], weight[0]
    return found


def lengths(x: Tensor) -> Tensor:
    """(T, C) -> (T,)，各向量的 L2 长度；半精度的先变宽。"""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.to(wide), dim=-1)


def final(model: GPT2Model, stream: Tensor, width: int) -> Tensor:
    """残差流 (T, C) -> logits (T, V)，只有 pre 才过末尾归一化；width：词表里真有词元的部分。

    Raises:
        NotFinite: 有 NaN 或无穷：比大小的数（名次、熵）会像是完美的。
    """
    x = stream if model.ln_f is None else model.ln_f(stream)
    logits = model.head(x)[..., :width]
    if not bool(logits.isfinite().all()):
        raise NotFinite("the logits are not finite: check the weights of this model")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _through(
    residual: Residual,
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    norm: nn.Module,
    post: nn.Module | None,
) -> tuple[Tensor, Tensor]:
    """(子层之后的残差流, 分支加进去的)。"""
    kept: list[Tensor] = []

    def noted(h: Tensor) -> Tensor:
        kept.append(branch(h))
        return kept[0]

    return residual(x, noted, norm, post), kept[0]

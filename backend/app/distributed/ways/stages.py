"""流水线的一段：连续的几层；第一段另有嵌入，最后一段另有末尾归一化与损失。

段与 rank：第 s 段在 rank s mod W；或折返（0 与 2W-1 都在 rank 0），共享的词表于是只有一份。
B 批、T 词元数、C 宽度、W rank 数。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Model
from app.models.transformer.experts.balance import balance
from app.models.transformer.layers.context import make_notes

Autocast = Callable[[], AbstractContextManager[object]]
# 文档号与掩码，各 (B, T)，按 GPT2Model.forward 的名字；没有的不在内。
Places = Mapping[str, Tensor]


def layers_of(stage: int, stages: int, n_layer: int) -> range:
    """前几段各多一层：最后一段另有词表的损失。"""
    each, more = divmod(n_layer, stages)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


def stages_of(rank: int, ranks: int, stages: int, folded: bool) -> list[int]:
    """rank 有哪几段，升序。"""
    return [s for s in range(stages) if rank_of(s, ranks, folded) == rank]


def rank_of(stage: int, ranks: int, folded: bool) -> int:
    lap, place = divmod(stage, ranks)
    return ranks - 1 - place if folded and lap % 2 else place


def keep_stages(model: GPT2Model, kept: Sequence[int], stages: int) -> None:
    """只留下这几段的参数；名字不变（"h.7. ..."），别处的模块还在，只是没有了权重。

    共享词表时最后一段也留着 wte：没有第一段的 rank 上它是第二份，两份的梯度相加（pipeline.py）。
    """
    mine = {i for s in kept for i in layers_of(s, stages, model.config.n_layer)}
    for name in [name for name in model.h if int(name) not in mine]:
        del model.h[name]
    first, last = 0 in kept, stages - 1 in kept
    if not first:
        if model.embed.wpe is not None:
            _forget(model.embed.wpe)
        if not (last and model.lm_head is None):
            _forget(model.embed.wte)
    if not last:
        for module in (model.ln_f, model.lm_head):
            if module is not None:
                _forget(module)


def _forget(module: nn.Module) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        setattr(module, name, None)


class Stage(nn.Module):
    """torch.distributed.pipelining 要的模块；参数就是模型里的那几个。

    Attributes:
        seen: 每次前向记下 (均衡损失·份额, 负载, 丢弃)；没有 MoE 层为空。
    """

    def __init__(self, model: GPT2Model, index: int, stages: int, autocast: Autocast) -> None:
        super().__init__()
        config = model.config
        self.layers = layers_of(index, stages, config.n_layer)
        self.first, self.last = index == 0, index == stages - 1
        self.config, self.autocast = config, autocast
        self.blocks = nn.ModuleDict({str(i): model.h[str(i)] for i in self.layers})
        self.embed = model.embed if self.first else None
        self.ln_f = model.ln_f if self.last else None
        tied = model.lm_head is None
        self.head = (model.embed.wte if tied else model.lm_head) if self.last else None
        # 绑定的方法，不是子模块：别的并行可能已换下它们。
        self.locate, self.contexts, self.head_loss = model.locate, model.contexts, model.head_loss
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        targets: Tensor,
        share: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """x：第一段是 (B, T) 的 ids，别的是上一段的 (B, T, C)；share (1, 2) 见 Pipeline.step。

        最后一段给 (1,) 的损失·份额。
        """
        with self.autocast():
            where = self.locate(ids, attention_mask, None, segment_ids, None, None)
            if self.embed is not None:
                x = self.embed(ids, where)
            notes = make_notes(self.config)
            contexts = self.contexts(where, None, notes, x.dtype)
            for i in self.layers:
                x = self.blocks[str(i)](x, contexts[i])
            x = self._with_balance(x, [note.load for note in notes if note.load], share)
            if not self.last:
                return x
            loss = self.head_loss(x if self.ln_f is None else self.ln_f(x), targets)
        return (loss * share[0, 0].to(loss.dtype)).view(1)

    def _with_balance(self, x: Tensor, loads: list[Any], share: Tensor) -> Tensor:
        """各 MoE 层的平均是整个模型的：这一段出它那几层的份。"""
        if not loads:
            return x
        found = balance(self.config.moe, loads)
        part = found.aux_loss * (len(loads) / len(self.config.moe_layers))
        part = part * share[0, 1].to(part.dtype)
        self.seen.append((part.detach(), found.load, found.dropped))
        y: Tensor = _Inject.apply(x, part)
        return y


class _Inject(torch.autograd.Function):
    """x 原样；反向时给 loss 梯度 1：中间的段没有通到最后损失的别的路。"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad[0], torch.ones_like(ctx.like)

"""没有尽头的解码（StreamingLLM, Xiao et al. 2023, arXiv:2309.17453）。

缓存满了就丢掉中段：留最前 SINKS 个与最后 C//2 个，键往回转到新的位置，什么都不重算。
位置在缓存之内数，永远不超过 C。

字母：B 行数，T 本次词元数，V 词表，C 上下文长度。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.generation.context import DecodingContext
from app.generation.overflow import SINKS, kept_last
from app.models.transformer import GPT2Model
from app.models.transformer.layers.rope import rerotate


class SinkContext:
    """与 DecodingContext 同样的三件事。

    何时丢只由那一行自己的长度决定，结果才与同批的其它行无关；而缓存的 evict 对所有的行
    一起做，所以提示长度相同的行才共用一个缓存：长度有几种，每步就有几次前向。
    """

    def __init__(self, model: GPT2Model, prompts: Sequence[Sequence[int]], **options: Any) -> None:
        """options 与 DecodingContext 的相同。"""
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(row)
        self._groups = [
            (rows, _Stream(model, [prompts[row] for row in rows], **options))
            for rows in groups.values()
        ]
        self._device = model.device

    def prefill(self) -> Tensor:
        """见 DecodingContext.prefill。"""
        return self._join([stream.prefill() for _, stream in self._groups])

    def advance(self, chosen: Tensor, history: Callable[[int], Sequence[int]]) -> Tensor:
        """见 DecodingContext.advance；从不重算，所以 history 用不到。"""
        return self._join([stream.advance(chosen[rows], history) for rows, stream in self._groups])

    def keep(self, rows: Sequence[int]) -> None:
        """见 DecodingContext.keep。"""
        kept = []
        for old, stream in self._groups:
            new = [i for i, row in enumerate(rows) if row in old]
            if new:
                stream.keep([old.index(rows[i]) for i in new])
                kept.append((new, stream))
        self._groups = kept

    def _join(self, logits: list[Tensor]) -> Tensor:
        """各组的 (b, V) -> (B, V)，回到各行的次序。"""
        order = torch.tensor([row for rows, _ in self._groups for row in rows])
        return torch.cat(logits)[order.argsort().to(self._device)]


class _Stream(DecodingContext):
    """步调一致的几行。"""

    def _forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """喂到满为止，丢掉中段，再喂其余的；与一个一个喂相同。"""
        config = self._model.config
        size = config.context_size
        turn = None
        if config.position == "rope":
            turn = partial(rerotate, rope=config.rope, context_size=size)
        # 一组的提示一样长，所以没有填充。
        assert mask is None
        while True:
            if self._cache.uniform == size:
                self._cache.evict(SINKS, kept_last(size), turn)
            assert self._cache.uniform is not None
            room = size - self._cache.uniform
            logits = super()._forward(ids[:, :room], None)
            ids = ids[:, room:]
            if ids.shape[1] == 0:
                return logits

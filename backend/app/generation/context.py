"""解码时的上下文：缓存、各行的窗口，以及满了之后怎么办。

字母：B 行数，T 本次词元数，V 词表，C 上下文长度。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from app.generation.graph_step import GraphStep, choose_graph
from app.generation.lean_step import LeanStep, why_not_lean
from app.generation.overflow import Overflow
from app.models.transformer import GPT2Config, GPT2Model, KVCache
from app.models.transformer.cache.kv_dtype import KVDtype


def cache_options(config: GPT2Config, longest: int, overflow: Overflow) -> dict[str, Any]:
    """最长的一行一共喂 longest 个词元时，怎样的缓存恰好够（KVCache.for_model 的参数）。

    sinks 不用环：挪动之后窗口里又有了开头那几个键，而环里早已没有它们。
    """
    if overflow == "extend":
        return {"max_len": longest}
    return {"max_len": min(config.context_size, longest), "ring": overflow != "sinks"}


def ring_keys(config: GPT2Config, longest: int, overflow: Overflow) -> dict[str, int]:
    """{图样: 环里的键数}；留着全部键的层不在内。不分配内存。"""
    cache = KVCache.for_model(config, 1, **cache_options(config, longest, overflow), device="meta")
    held = [keys.shape[2] - 1 for keys in cache.keys]
    assert cache.max_len is not None
    return {str(p): n for p, n in zip(config.patterns, held, strict=True) if n < cache.max_len}


def window_start(length: int, context_size: int) -> int:
    """长 length 的序列此刻从哪里看起：越过 C 的那一步只留最后 C//2 个，然后再长到 C。

    学得的位置不能平移，所以留下的要从位置 0 重算；平均每个词元多算约一个。
    起点只由长度决定，所以一次生成与分两次接着生成看到的窗口相同。
    """
    if length <= context_size:
        return 0
    stride = context_size + 1 - max(1, context_size // 2)
    return -(-(length - context_size) // stride) * stride


class DecodingContext:
    """一批行的缓存；行的次序就是缓存的行，keep 之后变少。"""

    def __init__(
        self,
        model: GPT2Model,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        prefill_chunk: int | None,
        overflow: Overflow,
        kv_dtype: KVDtype,
    ) -> None:
        """prompts: 各行的提示，都不空。room: 提示之后至多再喂多少个词元。"""
        self._model, self._chunk = model, prefill_chunk
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._lengths = [len(prompt) for prompt in prompts]
        self._device = model.device
        self._lean = LeanStep(model) if why_not_lean(model) is None else None
        self._graph = GraphStep(model) if choose_graph(model, room)[0] else None
        longest = max(self._lengths) + room
        # 窗口长到这么长才滑；extend 与 sinks 从不滑。
        self._limit = model.config.context_size if overflow in ("error", "slide") else longest
        options = cache_options(model.config, longest, overflow)
        rows = len(set(self._prompts))
        self._cache = model.new_cache(rows, **options, kv_dtype=kv_dtype)

    def prefill(self) -> Tensor:
        """算各行的提示，返回最后一个词元的 logits (B, V)；相同的提示只算一次。"""
        unique = list(dict.fromkeys(self._prompts))
        logits = self._feed([p[window_start(len(p), self._limit) :] for p in unique])
        if len(unique) < len(self._prompts):
            where = {prompt: i for i, prompt in enumerate(unique)}
            rows = torch.tensor([where[p] for p in self._prompts], device=self._device)
            self._cache.reorder(rows)
            logits = logits[rows]
        return logits

    def advance(self, chosen: Tensor, history: Callable[[int], Sequence[int]]) -> Tensor:
        """每行喂一个新词元 (B,)，返回 logits (B, V)。

        history(i): 第 i 行的全部词元，含新的这个；只在那一行要滑时才取。已结束、只是还没有
        被 keep 掉的行给出多少都可以：它的结果没有人看。
        """
        self._lengths = [n + 1 for n in self._lengths]
        starts = [self._slid_to(n) for n in self._lengths]
        if not any(starts):
            return self._forward(chosen[:, None], None)
        if all(starts):
            self._cache.truncate(0)
        else:
            limits = [0 if start else self._limit for start in starts]
            self._cache.truncate(torch.tensor(limits, device=self._device))
        single = chosen.tolist()
        return self._feed(
            [history(i)[start:] if start else single[i : i + 1] for i, start in enumerate(starts)]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """只留这些行，按这个次序。"""
        self._cache.reorder(torch.tensor(rows, device=self._device))
        self._lengths = [self._lengths[row] for row in rows]

    def _slid_to(self, length: int) -> int:
        """第 length 个词元使窗口移到的起点；没有移动则为 0。"""
        start = window_start(length, self._limit)
        return start if start != window_start(length - 1, self._limit) else 0

    def _feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """左侧填充成一块，按 prefill_chunk 分段喂入，返回最后一列的 logits (B, V)。"""
        width = max(map(len, rows))
        padded = [[0] * (width - len(row)) + list(row) for row in rows]
        ids = torch.tensor(padded, device=self._device)
        mask = None
        if any(len(row) < width for row in rows):
            lengths = torch.tensor([len(row) for row in rows], device=self._device)
            columns = torch.arange(width, device=self._device)
            mask = (columns >= width - lengths[:, None]).long()
        size = self._chunk or width
        for at in range(0, width, size):
            part = None if mask is None else mask[:, at : at + size]
            logits = self._forward(ids[:, at : at + size], part)
        return logits

    def _forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if ids.shape[1] == 1 and mask is None and self._lean and self._cache.uniform is not None:
            return self._lean(ids[:, 0], self._cache)
        if ids.shape[1] == 1 and mask is None and self._graph and self._graph.takes(self._cache):
            return self._graph(ids[:, 0], self._cache)
        out = self._model(
            ids, attention_mask=mask, cache=self._cache, use_cache=True, logits_to_keep=1
        )
        return out["logits"][:, -1]

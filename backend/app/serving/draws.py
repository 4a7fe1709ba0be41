"""每行各按自己的设置选词元；设置相同的行一起算。

次序：偏置、出现过的惩罚、重复惩罚、温度、top-k、top-p、min-p。K 行数、V 词表。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from app.generation.config import SamplingConfig
from app.generation.sampling import pick
from app.serving.request import Ask, Scored


class Drawing(Protocol):
    """选一个词元要知道的：made 已写了几个，counts 各写了几次，uniforms 每步一个均匀数，
    seen (V,) 提示与已写里出现过的。"""

    @property
    def ask(self) -> Ask: ...
    @property
    def counts(self) -> dict[int, int]: ...
    @property
    def uniforms(self) -> Tensor | None: ...
    @property
    def seen(self) -> Tensor | None: ...
    @property
    def made(self) -> int: ...


def joined(rows: Sequence[Tensor]) -> Tensor:
    """各 (1, V) -> (K, V)；本来就挨着的不抄：三十二行、五万个词，抄一遍就是 6 MB。"""
    first, width = rows[0], rows[0].shape[1]
    step = first.stride(0)
    start, size = first.storage_offset(), first.untyped_storage().data_ptr()
    for i, row in enumerate(rows):
        if row.storage_offset() != start + i * step or row.untyped_storage().data_ptr() != size:
            return torch.cat(list(rows))
    return first.as_strided((len(rows), width), (step, 1))


def draw(logits: Tensor, runs: Sequence[Drawing]) -> list[int]:
    """logits (K, V) -> 每行一个词元号；设置使一行没有可选的，那一行是 sampling.NOT_FINITE。"""
    chosen = [0] * len(runs)
    groups: dict[SamplingConfig, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(run.ask.sampling, []).append(i)
    whole = len(groups) == 1 and not any(_adjusts(run) for run in runs)
    for sampling, members in groups.items():
        rows = logits if whole else torch.stack([_adjusted(logits[i], runs[i]) for i in members])
        points = [_point(runs[i]) for i in members]
        masks = [mask for i in members if (mask := runs[i].seen) is not None]
        picked = pick(
            rows,
            sampling,
            None if sampling.greedy else torch.tensor(points, dtype=torch.float64),
            torch.stack(masks).to(rows.device) if masks else None,
        )
        for i, token in zip(members, picked.tolist(), strict=True):
            chosen[i] = token
    return chosen


def _point(run: Drawing) -> float:
    return 0.0 if run.uniforms is None else float(run.uniforms[run.made])


def _adjusts(run: Drawing) -> bool:
    ask = run.ask
    penalties = ask.presence_penalty or ask.frequency_penalty
    return bool(ask.logit_bias or penalties or run.made < ask.min_tokens)


def _adjusted(row: Tensor, run: Drawing) -> Tensor:
    """偏置与惩罚之后的 (V,)；没有就是原来那一行。"""
    if not _adjusts(run):
        return row
    ask, row = run.ask, row.clone()
    banned = ask.stop_ids if run.made < ask.min_tokens else ()
    penalised = run.counts if ask.presence_penalty or ask.frequency_penalty else {}
    if ask.logit_bias:
        row[list(ask.logit_bias)] += row.new_tensor(list(ask.logit_bias.values()))
    if penalised:
        counts = row.new_tensor(list(penalised.values()))
        row[list(penalised)] -= ask.presence_penalty + ask.frequency_penalty * counts
    if banned:
        row[list(banned)] = -math.inf
    return row


def scored(logits: Tensor, tokens: Sequence[int], k: int) -> list[Scored]:
    """logits (K, V) 与各行的词元 -> 模型自己的对数概率与最可能的 k 个。

    选中的与最可能的从同一个张量取数：写成 JSON 之后仍然处处相等。
    """
    return _scored(_logs(logits), tokens, k)


def detailed(logits: Tensor, tokens: Sequence[int], k: int) -> list[Scored]:
    """scored，再加名次与熵：多读两遍词表，所以只给要的人。"""
    logs = _logs(logits)
    own = logs.gather(1, torch.tensor(list(tokens), device=logs.device)[:, None])
    ranks = (logs > own).sum(-1).tolist()
    entropies = torch.special.entr(logs.exp()).sum(-1).tolist()
    return [
        replace(one, rank=rank, entropy=entropy)
        for one, rank, entropy in zip(_scored(logs, tokens, k), ranks, entropies, strict=True)
    ]


def _logs(logits: Tensor) -> Tensor:
    return (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(-1)


def _scored(logs: Tensor, tokens: Sequence[int], k: int) -> list[Scored]:
    index = torch.tensor(list(tokens), device=logs.device)[:, None]
    own = logs.gather(1, index)[:, 0].tolist()
    if k == 0:
        return [Scored(t, logprob=lp) for t, lp in zip(tokens, own, strict=True)]
    values, ids = logs.topk(min(k, logs.shape[1]), dim=-1)
    return [
        Scored(t, logprob=lp, top=tuple(zip(row_ids, row_values, strict=True)))
        for t, lp, row_ids, row_values in zip(
            tokens, own, ids.tolist(), values.tolist(), strict=True
        )
    ]

"""一段数据里，每个专家分到多少词元。

C 上下文长度、M 个 MoE 层、E 专家数。
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from app.models.transformer import GPT2Model

from .perplexity import TokenSource


@torch.inference_mode()
def expert_load(
    model: GPT2Model,
    separator: int,
    source: TokenSource,
    batch_size: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """(M, E) int64，CPU：互不重叠的窗口，每个词元读一次；开头另有一个分隔符，也算。

    Raises:
        ValueError: 数据是空的，或模型没有专家。
    """
    if not model.config.moe_layers:
        raise ValueError("moe_num_experts=0: the model has no experts to count")
    if source.n_tokens < 1:
        raise ValueError("the data has no tokens: there is nothing to count")
    context, total = model.config.context_size, source.n_tokens
    load = torch.zeros(len(model.config.moe_layers), model.config.moe_num_experts).long()
    # 第一行是分隔符与开头的词元，其后每行一个窗口。
    first = min(context - 1, total)
    rows = [np.concatenate([[separator], source.read(0, first)])]
    starts = range(first, total, context)
    load += _count(model, rows)
    advance(first)
    for i in range(0, len(starts), batch_size):
        rows = [source.read(s, min(context, total - s)) for s in starts[i : i + batch_size]]
        load += _count(model, rows)
        advance(sum(map(len, rows)))
    return load


def _count(model: GPT2Model, rows: list[np.ndarray]) -> Tensor:
    """短的行（只有最后一行）右边填充；填充不进路由。"""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[i, : len(row)] = 1
    where = model.device
    out = model(
        ids.to(where),
        attention_mask=None if bool(mask.all()) else mask.to(where),
        logits_to_keep=1,
    )
    return out["expert_load"].cpu()

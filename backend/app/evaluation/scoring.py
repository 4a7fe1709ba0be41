"""逐词元的负对数似然：困惑度与各种任务共用的一次前向。

B 行数、T 一批里最长一行的输入词元数、C 宽度、V 词表、R 要打分的词元数。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.models.transformer import GPT2Model

# 一块 logits 的上限：整张 (B, T, V) 在 GPT-2 的词表上动辄几 GB。
_CHUNK_BYTES = 20 * 2**20


class Metric(NamedTuple):
    """一个数和它的标准误；样本不足两个时没有标准误，没有可除的东西时没有值。"""

    value: float | None
    stderr: float | None

    def exp(self) -> Metric:
        """平均 nat -> 困惑度；标准误按一阶展开。大得 float 装不下时是 inf，没有标准误。"""
        assert self.value is not None
        if self.value >= 709:
            return Metric(math.inf, None)
        value = math.exp(self.value)
        return Metric(value, None if self.stderr is None else value * self.stderr)


class Scored(NamedTuple):
    """一行里打了分的词元：nats 各自的负对数似然 (n,) float64；greedy 是否恰为最可能的 (n,)。"""

    nats: np.ndarray
    greedy: np.ndarray


@torch.inference_mode()
def score_rows(model: GPT2Model, rows: Sequence[np.ndarray], first: Sequence[int]) -> list[Scored]:
    """各行从下标 first[i]（至少 1）起的词元，各以它之前的全部词元为上文。

    短行在右侧补齐：注意力都是因果的，补的词元谁也看不见，不需要掩码。
    只有要打分的位置经过输出头：步长小时，头的代价随步长而不随窗口。

    Raises:
        ValueError: 模型不在 eval 状态（dropout 会改变结果），一行放不进上下文，或损失不是有限数。
        MemoryError: 内存不够，附改法。
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before scoring")
    width = max(len(row) for row in rows) - 1
    ids = np.zeros((len(rows), width + 1), dtype=np.int64)
    wanted = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        wanted[i, first[i] - 1 : len(row) - 1] = True
    try:
        nats, greedy = _score(model, torch.from_numpy(ids), torch.from_numpy(wanted))
    except torch.OutOfMemoryError as error:
        fix = f"use --batch-size {len(rows) // 2}" if len(rows) > 1 else "use another device"
        raise MemoryError(
            f"out of memory with {len(rows)} rows of {width} tokens at once: {fix} "
            "(the result stays the same)"
        ) from error
    if not np.isfinite(nats).all():
        raise ValueError(
            "the model gives a loss that is not a finite number: its weights are damaged"
        )
    ends = np.cumsum(wanted.sum(1))[:-1]
    return list(map(Scored, np.split(nats, ends), np.split(greedy, ends)))


def _score(model: GPT2Model, ids: Tensor, wanted: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, T+1)、wanted (B, T) -> 两个 (R,)，按行相接。"""
    ids, wanted = ids.to(model.device), wanted.to(model.device)
    hidden = model.features(ids[:, :-1])[wanted]  # (R, C)
    labels = ids[:, 1:][wanted]  # (R,)
    size = max(1, _CHUNK_BYTES // (model.config.vocab_size * 4))
    nats, greedy = [], []
    for h, label in zip(hidden.split(size), labels.split(size), strict=True):
        logits = model.head(h)
        # 半精度的 logits 升到 float32 再归约，与训练时相同。
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(1, label[:, None]).squeeze(1)
        nats.append((logits.logsumexp(1) - chosen).cpu().double())
        greedy.append((logits.argmax(1) == label).cpu())
    return torch.cat(nats).numpy(), torch.cat(greedy).numpy()

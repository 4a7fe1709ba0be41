"""一段文字在一个模型眼里：每个词元的对数概率与名次。

T 词元数、V 词表。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.models.transformer import GPT2Model

from .attention import to_numpy
from .lens import NO_RANK, rank_of
from .slices import Slice, Steps
from .walk import final, walk


@dataclass(frozen=True)
class Score:
    """各 (T,)：对数概率（纳特），名次（0 最前）；头一个词元没有来由，是 NaN 与 NO_RANK。"""

    logprob: np.ndarray
    rank: np.ndarray


def score(model: GPT2Model, ids: Sequence[int], width: int, rows: int) -> Steps[Score]:
    """width：词表里真有词元的部分；rows：一片至多几行。

    Raises:
        ValueError: 见 walk。
    """
    found = yield from walk(model, ids)
    stream, targets = found.streams[-1][:-1], torch.tensor(list(ids[1:]), device=model.device)
    logprobs, ranks = [float("nan")], [NO_RANK]
    for x, wanted in zip(stream.split(rows), targets.split(rows), strict=True):
        if len(wanted) == 0:
            continue
        yield Slice(len(wanted), width * model.config.n_embed)
        logs = final(model, x, width).log_softmax(-1)
        logprobs += to_numpy(logs.gather(-1, wanted[:, None])[:, 0]).tolist()
        ranks += rank_of(logs, wanted).tolist()
    return Score(np.array(logprobs), np.array(ranks, dtype=np.int64))

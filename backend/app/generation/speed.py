"""解码有多快：用户续写时走的那条路，轮流测几个模型，才比得出快慢。"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from app.models.transformer import GPT2Model

from .config import Options, SamplingConfig
from .generate import complete
from .row import Callbacks

_PROMPT, _NEW = 16, 64


def decode_speed(models: Sequence[GPT2Model], rounds: int) -> list[float]:
    """各模型每秒续写多少个词元：一行、贪心，不算提示；取各轮的中位数，另有一轮只热身。"""
    context = min(model.config.context_size for model in models)
    prompt = min(_PROMPT, max(1, context // 2))
    new = min(_NEW, context - prompt)
    if new < 2:
        raise ValueError(
            f"context_size={context} leaves no room to time decoding in: use 4 or more"
        )
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, each in zip(models, times, strict=True):
            seconds = _seconds(model, prompt, new)
            if number:
                each.append(seconds)
    return [(new - 1) / statistics.median(each) for each in times]


def _seconds(model: GPT2Model, prompt: int, new: int) -> float:
    """第一个新词元到最后一个。"""
    marks: list[float] = []
    options = Options(max_new_tokens=new, sampling=SamplingConfig(temperature=0.0))
    ids = [i % model.config.vocab_size for i in range(prompt)]
    calls = Callbacks(on_token=lambda row, token: marks.append(time.perf_counter()))
    complete(model, [ids], options, calls=calls)
    return marks[-1] - marks[0]

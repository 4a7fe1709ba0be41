"""开张时量一量：一步 n 个词元要多少秒。"""

from __future__ import annotations

import time

import torch

from app.models.transformer.cache.row_cache import Span
from app.serving.flat_step import FlatStep
from app.serving.schedule import Costs

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_ROUNDS = 2


@torch.inference_mode()
def measure(flat: FlatStep) -> Costs:
    """缓存要是空的，量完也是。取几轮里最快的：别的程序只会使它变慢。"""
    cache = flat.cache
    most = min(cache.max_len or _SIZES[-1], cache.max_chunk)
    best: dict[int, float] = {}
    for _ in range(_ROUNDS + 1):
        for size in (n for n in _SIZES if n <= most):
            start = time.perf_counter()
            flat([0] * size, [Span(0, size)], [size - 1])
            best[size] = min(best.get(size, float("inf")), time.perf_counter() - start)
            cache.reset(0)
    points, least = [], 0.0
    for size, seconds in best.items():
        # 小模型上量出来的会上下跳；多算几个词元不会更快。
        least = max(least, seconds)
        points.append((size, least))
    return Costs(tuple(points))

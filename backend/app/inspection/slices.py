"""看里面的活切成片：引擎在两片之间照样写别人的文字。

一片先报价再做：报的是"几个词元过多少个权重"，秒数由服务按自己量过的价目算。
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import torch

from app.models.transformer.config import GPT2Config
from app.models.transformer.layers.fused import attention_parts, feed_forward_parts

T = TypeVar("T")


class Slice(NamedTuple):
    """接下来的一片：tokens 个词元各过 weights 个权重。"""

    tokens: int
    weights: int


Steps = Generator[Slice, None, T]


@torch.inference_mode()
def whole(steps: Steps[T]) -> T:
    """不切片，一口气做完。"""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def attention_cost(config: GPT2Config, tokens: int) -> int:
    """一层注意力，一个词元过的权重；打分与取值也折成权重，图另算一遍打分。"""
    rows = sum(attention_parts(config).values()) + config.n_embed
    return config.n_embed * (rows + 4 * tokens)


def feed_forward_cost(config: GPT2Config, layer: int) -> int:
    """一层前馈，一个词元过的权重；有专家的只算去的那几个。"""
    hidden = config.mlp_hidden
    if layer in config.moe_layers:
        hidden = config.moe_top_k * config.expert_hidden + config.shared_hidden
    return config.n_embed * (sum(feed_forward_parts(config, hidden).values()) + hidden)


def forward_cost(config: GPT2Config) -> int:
    """整个前向，一个词元过的权重，不算输出头与打分。"""
    each = (attention_cost(config, 0) + feed_forward_cost(config, i) for i in range(config.n_layer))
    return sum(each)


def dearest(config: GPT2Config, tokens: int) -> Slice:
    """tokens 个词元的前向里最贵的一片。"""
    costs: list[Any] = [feed_forward_cost(config, i) for i in range(config.n_layer)]
    return Slice(tokens, max(attention_cost(config, tokens), *costs))

"""一个词元要多少次浮点运算：只数矩阵乘，乘与加各算一次。

    前向 = 2·W + 4·C·Σ_层 k        反向 = 2·前向

W 进矩阵乘的权重数（词嵌入只查表，不算；输出头算，共享与否都一样；专家只算挑中的），C 宽度，
k 这一层每个查询平均看见的键数：分数 q·k 与加权的 v 各是每对 2·C。略去注意力就是 Kaplan et al. 2020
（arXiv:2001.08361 第 2.1 节）的 6N；PaLM（arXiv:2204.02311 附录 B）的 6N + 12·L·H·Q·T 连看不见的
对也数，这里只数图样看得见的。为省内存而重算的不数，与 PaLM 的 MFU 一致。
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from app.models.transformer.config import GPT2Config
from app.models.transformer.model import GPT2Model
from app.models.transformer.visibility.coverage import coverage
from app.models.transformer.weights.own_folder import expected_shapes

FORMULA = "2 per weight in a product + 4 x width per visible key and layer; backward is twice"


@dataclass(frozen=True)
class Flops:
    """一个词元的一次前向。

    Attributes:
        dense: 线性层与输出头。
        attention: 打分与加权，随上下文而增。
        exact: False = 看得见的键数由抽查估计。
    """

    dense: float
    attention: float
    exact: bool

    @property
    def forward(self) -> float:
        return self.dense + self.attention

    @property
    def backward(self) -> float:
        return 2 * self.forward

    @property
    def total(self) -> float:
        return self.forward + self.backward


def product_weights(config: GPT2Config) -> int:
    """每个词元都要乘一遍的权重数：各层的矩阵与输出头。"""
    blocks = 0
    for name, shape in expected_shapes(GPT2Model, config).items():
        if name.startswith("h.") and name.endswith(".weight") and len(shape) >= 2:
            blocks += math.prod(shape[-2:]) * (config.moe_top_k if len(shape) == 3 else 1)
    return blocks + config.vocab_size * config.n_embed


def flops_per_token(config: GPT2Config, length: int | None = None) -> Flops:
    """length 个词元（默认 context_size）的一行里，平均每个词元的运算数。

    Raises:
        ValueError: length 小于 1。
    """
    length = config.context_size if length is None else length
    found = {pattern: coverage(pattern, length) for pattern in dict.fromkeys(config.patterns)}
    keys = sum(found[pattern].mean for pattern in config.patterns)
    return Flops(
        dense=2.0 * product_weights(config),
        attention=4.0 * config.n_embed * keys,
        exact=all(one.exact for one in found.values()),
    )

"""量化测试共用：一个小模型换成各种码。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from app.models.transformer import GPT2Model
from app.quantization.codes import Scheme
from app.quantization.model import VOCABULARY, QuantizedModel, matrices
from app.quantization.rtn import round_to_nearest
from tests.models.helpers import tiny_model

SCHEMES = {
    "fp16": Scheme(16),
    "int8": Scheme(8),
    "int4": Scheme(4, 32),
    "int4 asymmetric": Scheme(4, 16, True),
}


def float_model(**changes: Any) -> GPT2Model:
    return tiny_model(torch.float32, 1.0, **({"n_embed": 64, "vocab_size": 48} | changes))


def quantized(model: GPT2Model, scheme: Scheme, head: Scheme | None = None) -> QuantizedModel:
    """取整到最近；词表的矩阵默认 8 位（scheme 是 16 位时也 16 位）。"""
    head = head or (scheme if scheme.bits == 16 else Scheme(8))
    state = model.state_dict()
    codes = {
        name: round_to_nearest(
            state[name], head if name in VOCABULARY else _fitting(scheme, shape[-1]), name
        )
        for name, shape in matrices(model.config).items()
    }
    return QuantizedModel.of(model, codes, "rtn")


def _fitting(scheme: Scheme, width: int) -> Scheme:
    """有的变体的专家只有 16 宽。"""
    return scheme if width % max(scheme.group, 1) == 0 else replace(scheme, group=16)

"""按名字造模型。尺寸取自 GPT-2（Radford et al. 2019, 表 2）；头宽一律 64。"""

from __future__ import annotations

from typing import Any

from .config import GPT2Config
from .model import GPT2Model

PRESETS: dict[str, dict[str, int]] = {
    "small": {"n_layer": 12, "n_head": 12, "n_embed": 768},
    "medium": {"n_layer": 24, "n_head": 16, "n_embed": 1024},
    "large": {"n_layer": 36, "n_head": 20, "n_embed": 1280},
    "xl": {"n_layer": 48, "n_head": 25, "n_embed": 1600},
}


def create_gpt2_model(**config: Any) -> GPT2Model:
    """GPT2Config 的任何字段；没给的取默认。

    Raises:
        ValueError: 字段名不认识（给出最近的名字），或值不合法。
    """
    return GPT2Model(GPT2Config.from_dict(config))


def create_gpt2_small(**overrides: Any) -> GPT2Model:
    return create_gpt2_model(**{**PRESETS["small"], **overrides})


def create_gpt2_medium(**overrides: Any) -> GPT2Model:
    return create_gpt2_model(**{**PRESETS["medium"], **overrides})


def create_gpt2_large(**overrides: Any) -> GPT2Model:
    return create_gpt2_model(**{**PRESETS["large"], **overrides})


def create_gpt2_xl(**overrides: Any) -> GPT2Model:
    return create_gpt2_model(**{**PRESETS["xl"], **overrides})

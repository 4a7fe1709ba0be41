"""PEFT 的文件里一对 A、B 叫什么：base_model.model.<那边的模块名>.lora_A.weight。

那边的模型是 transformers 的 GPT2LMHeadModel 或 OpenAIGPTLMHeadModel（形状有对应时），否则是我们自带
代码的那个（app/interop/transformers），名字是 model. 加我们自己的。
"""

from __future__ import annotations

from app.models.transformer import GPT2Config
from app.models.transformer.weights.families import FAMILIES, why_not
from app.models.transformer.weights.layouts import GPT2, OPENAI_GPT, OWN, Layout

PREFIX = "base_model.model."
_HEAD = "lm_head"
# 哪一种都有偏置；没有偏置的导出时补零，模块名不变。
_FAMILIES = {"gpt2": GPT2, "openai-gpt": OPENAI_GPT}


def layout_of(config: GPT2Config) -> Layout:
    biased = config.replace(bias=True)
    fits = (at for name, at in _FAMILIES.items() if why_not(FAMILIES[name], biased) is None)
    return next(fits, OWN)


def theirs(config: GPT2Config, module: str) -> str:
    """我们的模块名 -> 那边的，不含 PREFIX。"""
    if module == _HEAD:
        return _HEAD
    layout = layout_of(config)
    (name,), _ = layout.place(f"{module}.weight")
    return layout.prefixes[0] + name.removesuffix(".weight")


def is_transposed(config: GPT2Config) -> bool:
    """那边的矩阵存 (in, out)（Conv1D）：PEFT 叫它 fan_in_fan_out。"""
    return layout_of(config) is not OWN

"""transformers 眼里的配置：字段就是 GPT2Config 的字段，另给 transformers 的机器所认的名字。

字段从 GPT2Config 取而不是重抄一遍：它多一个开关，这里就多一个，检查也由它做。
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from app.models.transformer.config import GPT2Config
from app.models.transformer.visibility.atoms import Local
from app.models.transformer.visibility.pattern import CAUSAL, Pattern

_FIELDS = tuple(field.name for field in dataclasses.fields(GPT2Config))
# 由字段推出、只供别的库读的：文件里有就核对，不一致是错。
_DERIVED = ("head_dim", "intermediate_size")
# PEFT、vLLM、optimum 从字典或 config.json 里找这些名字；缺了不报错，而是悄悄当作默认值。
COMMON_NAMES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "tie_word_embeddings", *_DERIVED,
)  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


class WorkbenchConfig(PreTrainedConfig):
    """
    Raises:
        ValueError: 值越界或互相矛盾；由 GPT2Config 检查，点名两个值与改法。
    """

    model_type = "gpt2-workbench"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embed",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "context_size",
        "tie_word_embeddings": "tie_weights",
    }

    def __init__(self, **options: Any) -> None:
        options = self._own_names(options)
        derived = {name: options.pop(name) for name in _DERIVED if name in options}
        given = {name: options.pop(name) for name in _FIELDS if name in options}
        for name, value in GPT2Config.from_dict(given).to_dict().items():
            setattr(self, name, value)
        for name, value in derived.items():
            _check_same(name, value, "what follows from the others", getattr(self, name))
        self.use_cache = options.pop("use_cache", True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, options.pop(name, None))
        super().__init__(**options)

    def _own_names(self, options: dict[str, Any]) -> dict[str, Any]:
        """通用的名字换成字段的；两个名字都给了就要一致。"""
        named = {key: value for key, value in options.items() if key not in self.attribute_map}
        kv_heads = named.pop("num_key_value_heads", None)
        for key in self.attribute_map.keys() & options.keys():
            ours = self.attribute_map[key]
            if ours in named:
                _check_same(key, options[key], ours, named[ours])
            named[ours] = options[key]
        if kv_heads is not None:
            heads = named.get("n_head", GPT2Config.n_head)
            if named.get("n_kv_head") is not None:
                _check_same("num_key_value_heads", kv_heads, "n_kv_head", named["n_kv_head"])
            named["n_kv_head"] = None if kv_heads == heads else kv_heads
        return named

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {name: getattr(self, name) for name in COMMON_NAMES}

    def to_diff_dict(self) -> dict[str, Any]:
        """写进 config.json 的：等于默认值的也写，读它的库不知道我们的默认值。"""
        whole = self.to_dict()
        kept = {name: whole[name] for name in (*_FIELDS, *COMMON_NAMES)}
        return super().to_diff_dict() | kept

    def core(self) -> GPT2Config:
        """
        Raises:
            ValueError: 属性后来被改成了互相矛盾的值。
        """
        return GPT2Config.from_dict({name: getattr(self, name) for name in _FIELDS})

    @property
    def num_key_value_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        self.n_kv_head = value

    @property
    def head_dim(self) -> int:
        return self.n_embed // self.n_head

    @property
    def intermediate_size(self) -> int:
        return self.core().mlp_hidden

    @property
    def sliding_window(self) -> int:
        """transformers 只有一个窗口值：各层的 local(w) 恰好是同一个 w 时才有这个属性。"""
        window = sliding_window(self.core().patterns)
        if window is None:
            raise AttributeError(
                f"no sliding window in attention_pattern={self.attention_pattern!r}: "
                "set attention_pattern='local(w)' for one"
            )
        return window

    @sliding_window.setter
    def sliding_window(self, value: int) -> None:
        old = Local(self.sliding_window)
        patterns = (Local(value) if pattern == old else pattern for pattern in self.core().patterns)
        self.attention_pattern = [str(pattern) for pattern in patterns]

    @property
    def layer_types(self) -> list[str]:
        """各层的缓存该留多少。别的图样也留着全部键，由掩码挑。"""
        patterns = self.core().patterns
        window = sliding_window(patterns)
        return [SLIDING if _is_window(pattern, window) else FULL for pattern in patterns]


def sliding_window(patterns: tuple[Pattern, ...]) -> int | None:
    windows = {p.window for p in patterns if isinstance(p, Local) and p.dilation == 1}
    return windows.pop() if len(windows) == 1 else None


def mask_name(pattern: Pattern, window: int | None) -> str:
    """这种图样的掩码的名字：transformers 说得出的用它的叫法，否则就是图样的文字。"""
    if pattern == CAUSAL:
        return FULL
    return SLIDING if _is_window(pattern, window) else str(pattern)


def _is_window(pattern: Pattern, window: int | None) -> bool:
    return window is not None and pattern == Local(window)


def _check_same(name: str, value: Any, other: str, wanted: Any) -> None:
    if value != wanted:
        raise ValueError(
            f"{name}={value!r} but {other} is {wanted!r}: both say the same thing, so change both "
            "or leave one out"
        )

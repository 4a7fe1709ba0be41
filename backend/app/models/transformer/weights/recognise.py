"""没有写 model_type 的 config.json 是谁的：看 architectures，再看键。不需要 torch。"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..config import GPT2Config
from ..settings.json_file import read_json
from .families import FAMILIES, OWN_TYPE, Family, read_config

_OURS = frozenset(field.name for field in dataclasses.fields(GPT2Config)) | {"schema_version"}
# 只有 GPT2Config 有的名字；vocab_size、n_layer、dropout 之类别家也用。
_ONLY_OURS = frozenset({"schema_version", "context_size", "n_embed", "norm", "norm_type", "moe"})
# 各家的 config.json 里总有的，我们的从来没有。
_ONLY_THEIRS = frozenset(
    {
        "architectures", "transformers_version", "torch_dtype", "auto_map", "hidden_size",
        "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "n_embd", "n_ctx",
        "n_positions", "block_size", "initializer_range", "d_model", "num_heads",
    }
)  # fmt: skip
# 一种模型独有的键，认得出才猜；GPT-1 与 GPT-2 只差激活的名字。
_TELLING = (
    ("mixtral", {"num_local_experts", "hidden_size"}),
    ("opt", {"do_layer_norm_before", "hidden_size"}),
    ("opt", {"ffn_dim", "word_embed_proj_dim"}),
    ("openai-gpt", {"afn", "n_embd"}),
    ("gpt2", {"activation_function", "n_embd"}),
    ("gpt2", {"n_positions", "n_embd", "n_head", "n_layer"}),
)


def recognise(raw: Any, where: str) -> Any:
    """raw 补上 model_type；我们自己的、已写明的原样给回。

    Raises:
        ValueError: 是别家的，而认不出是哪一种；说出它写着什么。
    """
    if not isinstance(raw, dict) or "model_type" in raw or not _foreign(raw):
        return raw
    family = _by_architecture(raw) or _by_keys(raw)
    if family is None:
        names = raw.get("architectures")
        what = f"architectures={names!r}" if names else f"the keys {', '.join(sorted(raw)[:6])}"
        raise ValueError(
            f"{where} is another program's config without model_type ({what}), not one of ours "
            "(n_embed, context_size): add the model_type it was made with; known are "
            f"{', '.join(FAMILIES)}"
        )
    return {**raw, "model_type": family}


def config_from_json(raw: Any, where: str) -> GPT2Config:
    """任何一种 config.json 译成我们的：自己的、认得出的别家的。

    Raises:
        ValueError: 见 recognise、read_config 与 GPT2Config.from_dict。
    """
    raw = recognise(raw, where)
    if isinstance(raw, dict) and "model_type" in raw:
        return read_config(raw, where)
    try:
        return GPT2Config.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_from_file(path: Path) -> GPT2Config:
    """
    Raises:
        ValueError: 见 config_from_json，或读不懂。
    """
    return config_from_json(read_json(path), str(path))


def _foreign(raw: dict[str, Any]) -> bool:
    return bool(_ONLY_THEIRS & raw.keys()) and not _ONLY_OURS & raw.keys()


def _by_architecture(raw: dict[str, Any]) -> str | None:
    names = raw.get("architectures")
    for name in names if isinstance(names, list) else []:
        for family in FAMILIES.values():
            if isinstance(name, str) and _same_model(name, family):
                return family.model_type
        if name == "WorkbenchForCausalLM":
            return OWN_TYPE
    return None


def _same_model(name: str, family: Family) -> bool:
    """主干（GPT2Model）与带头的（GPT2LMHeadModel）是同一种；分类的头不是。"""
    stem = family.architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    return name in (family.architecture, f"{stem}Model", f"{stem}LMHeadModel")


def _by_keys(raw: dict[str, Any]) -> str | None:
    if raw.get("architectures"):
        return None
    return next((kind for kind, keys in _TELLING if keys <= raw.keys()), None)

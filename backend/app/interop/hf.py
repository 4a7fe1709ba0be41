"""写成 Hugging Face 的文件夹：配置、权重、生成的默认值、分词器，写完用 transformers 读回来比。

先写在旁边的临时文件夹，再改名：写到一半断了，目标处什么也没有。
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from app.common.files import write_folder
from app.data.tokenizers import Tokenizer
from app.interop import tokens
from app.interop.compare import Comparison, compare
from app.interop.equivalent import Weights, as_post, widened, with_biases
from app.models.transformer import GPT2Model
from app.models.transformer.weights.families import FAMILIES, VOCAB_KEY, write_config
from app.models.transformer.weights.layouts import write_tensors
from app.models.transformer.weights.own_folder import CONFIG_FILE, WEIGHTS_FILE
from app.models.transformer.weights.pretrained import LAYOUTS
from app.models.transformer.weights.safetensors_file import write_tensors_file

# CTranslate2 的 OPT 转换器把词表补到 8 的倍数，权重却不补，所以在这里补好。
_OPT_MULTIPLE = 8


def for_family(weights: Weights, family: str, tokenizer: Tokenizer | None) -> Weights:
    """改写成这一种模型认得的样子；没有分词器就不动词表。"""
    if family != "mixtral":
        weights = with_biases(weights if family == "gpt2" else as_post_if_deep(weights))
    if tokenizer is None:
        return weights
    size = max(weights.config.vocab_size, tokens.special_ids(tokenizer).pad + 1)
    if family == "opt":
        size = -(-size // _OPT_MULTIPLE) * _OPT_MULTIPLE
    return widened(weights, size)


def as_post_if_deep(weights: Weights) -> Weights:
    return as_post(weights) if weights.config.norm == "deepnorm" else weights


def write_hf(
    weights: Weights,
    family: str,
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> Weights:
    """
    Returns:
        写出的（改写过的）权重与说明。
    Raises:
        ValueError: 配置没有对应物（先问 targets），或 folder 已有东西。
    """
    trained = weights.config.vocab_size
    weights = for_family(weights, family, tokenizer).to(dtype)
    raw = write_config(FAMILIES[family], weights.config)
    raw |= {"dtype": str(next(iter(weights.state.values())).dtype).removeprefix("torch.")}
    if weights.config.vocab_size != trained:
        raw[VOCAB_KEY] = trained
    raw |= special_keys(tokenizer)
    files = {
        CONFIG_FILE: to_json(raw),
        "generation_config.json": to_json(generation_settings(raw, tokenizer)),
    }
    if tokenizer is not None:
        config = weights.config
        files |= tokens.tokenizer_files(tokenizer, config.context_size, config.vocab_size)

    def fill(new: Path) -> None:
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        tensors = write_tensors(LAYOUTS[family], weights.config, weights.state)
        write_tensors_file(tensors, new / WEIGHTS_FILE)

    write_folder(folder, fill)
    return weights


def compare_hf(model: GPT2Model, folder: Path, own_code: bool = False) -> Comparison | str:
    """用 transformers 读回来，与原模型比 logits；没有装则返回要装什么。

    own_code: 文件夹里的代码是刚刚由这里写的，可以运行。
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return "transformers is not installed: pip install 'gpt2-workbench[hf]'"
    from transformers import __version__

    dtype = next(model.parameters()).dtype
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=own_code
    ).eval()
    return compare(
        model,
        lambda ids: theirs(ids).logits,
        f"{type(theirs).__name__}, transformers {__version__}",
    )


def special_keys(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        # OPT 的默认值是它自己词表里的 id。
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    special = tokens.special_ids(tokenizer)
    start = tokenizer.start_ids[-1] if tokenizer.start_ids else special.end
    return {
        "bos_token_id": start,
        "eos_token_id": special.end,
        "pad_token_id": special.pad,
    }


def generation_settings(raw: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """停在分词器的每个停止 id；它没有文字的 id（填充符与空行）生成时不许出现。"""
    if tokenizer is None:
        return {}
    settings = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if len(tokenizer.stop_ids) > 1:
        settings["eos_token_id"] = list(tokenizer.stop_ids)
    unused = tokens.unused_ids(tokenizer, raw["vocab_size"])
    return {**settings, "suppress_tokens": unused}


def to_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"

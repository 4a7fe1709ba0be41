"""写成 Hugging Face 的文件夹：配置、权重、生成的默认值、分词器，写完用 transformers 读回来比。

先写在旁边的临时文件夹，再改名：写到一半断了，目标处什么也没有。
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.data.tokenizers import Tokenizer
from app.interop import tokens
from app.interop.compare import Comparison, compare
from app.interop.equivalent import Weights, as_post, widened, with_biases
from app.models.transformer import GPT2Model
from app.models.transformer.weights.families import FAMILIES, VOCAB_KEY, write_config
from app.models.transformer.weights.layouts import write_tensors
from app.models.transformer.weights.own_folder import CONFIG_FILE, WEIGHTS_FILE
from app.models.transformer.weights.pretrained import LAYOUTS

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
    from safetensors.torch import save_file

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
        files |= tokens.tokenizer_files(tokenizer, weights.config.context_size)

    def fill(new: Path) -> None:
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        tensors = write_tensors(LAYOUTS[family], weights.config, weights.state)
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})

    write_folder(folder, fill)
    return weights


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """
    Raises:
        ValueError: folder 已有东西：别人的文件从不覆盖。
    """
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        fill(temporary)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists: give another --out, nothing is overwritten")


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
    return {
        "bos_token_id": special.end,
        "eos_token_id": special.end,
        "pad_token_id": special.pad,
    }


def generation_settings(raw: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """分词器之外的 id（填充符与空行）没有文字，生成时不许出现。"""
    if tokenizer is None:
        return {}
    settings = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**settings, "suppress_tokens": [*range(tokenizer.vocab_size, raw["vocab_size"])]}


def to_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"

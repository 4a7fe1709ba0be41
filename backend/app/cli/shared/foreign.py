"""别处来的东西：在装入之前认出来，说该用哪个命令。"""

from __future__ import annotations

import json
from pathlib import Path

from app.models.transformer.weights.adapters import check_no_adapter

_CONFIG, _TOKENIZER = "config.json", "tokenizer_meta.json"
_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"


def refuse_foreign(path: Path) -> None:
    """
    Raises:
        ValueError: 没有这个文件夹，它是别处的权重（gpt2 import 才读），或旁边有适配器的权重。
    """
    wanted = "a run, checkpoint or model folder"
    if path.is_file():
        raise ValueError(
            f"{path} is a file: give {wanted}; weights from elsewhere become one with "
            f"`gpt2 import {path} --out NEW`"
        )
    if not path.is_dir():
        return
    if (path / _WEIGHTS).is_file() or not (path / _ADAPTER).is_file():
        check_no_adapter(path)
    kind = _foreign_kind(path)
    if kind is not None:
        raise ValueError(
            f"{path} is a Hugging Face folder ({kind}): make {wanted} of it first with "
            f"`gpt2 import {path} --out NEW`"
        )


def _foreign_kind(folder: Path) -> str | None:
    """别处的 config.json 自称什么；我们自己的、带着我们的分词器的、读不懂的，都是 None。"""
    file = folder / _CONFIG
    if not file.is_file() or (folder / _TOKENIZER).is_file():
        return None
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        # 坏的 config.json 由 from_pretrained 点名拒绝。
        return None
    if not isinstance(raw, dict) or ("n_embed" in raw and "model_type" not in raw):
        return None
    for key in ("model_type", "architectures"):
        if key in raw:
            return f"{key}={raw[key]!r}"
    return f"its {_CONFIG} has no n_embed"

"""Hugging Face hub 的名字变成本机的文件夹：先联网，不成再用缓存；两样都没有就说清楚。

只取配置与 safetensors（要时再加分词器）：别的文件，尤其是代码与 pickle，根本不下载。
"""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
MODEL_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json")
# adapter_config.json 只为认出适配器而取。
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
    "added_tokens.json", "special_tokens_map.json", "generation_config.json", "*.model",
    "adapter_config.json",
)  # fmt: skip


def find_folder(source: str | Path, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """source 是文件夹，或 hub 上的名字（如 openai-community/gpt2）。

    Raises:
        ValueError: 没有这个文件夹，而它也不像 hub 上的名字；或联网与缓存都取不到。
        ImportError: 要 huggingface_hub 而没有装。
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.exists():
        raise ValueError(f"{name} is a file, not a folder with a saved model: give its folder")
    if isinstance(source, Path) or not HUB_ID.fullmatch(name) or ".." in name:
        raise ValueError(f"{name} is not a folder with a saved model")
    return _download(name, files)


def _download(name: str, files: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{name!r} is not a folder here, and to look for it on the Hugging Face hub the extra "
            "is needed: pip install 'gpt2-workbench[hf]'"
        ) from None
    try:
        # 连不上时它自己改用缓存；仓库不存在则是另一种错。
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached and its cache does not hold it"
        cause: Exception = error
    except (OSError, ValueError, HFValidationError) as error:
        reason, cause = f"the hub says: {str(error).strip().splitlines()[0]}", error
    raise ValueError(
        f"{name!r} is neither a folder here nor to be had from the Hugging Face hub ({reason}): "
        "check the name, or download it where there is a network and give the folder"
    ) from cause

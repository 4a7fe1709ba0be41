"""from_pretrained：我们的文件夹、Hugging Face 的文件夹、hub 上的名字，都成为一个 GPT2Model。

只读 JSON 与 safetensors；pickle（.bin、.pt）只有 `gpt2 import --allow-pickle` 肯读。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..config import SCHEMA_VERSION, GPT2Config
from ..settings.fields import Mark, differing, marked
from ..settings.json_file import read_json
from .adapters import check_no_adapter
from .families import OWN_TYPE, extra_vocab, read_config
from .formats import find_loader
from .hub import find_folder
from .layouts import GPT2, MIXTRAL, OPENAI_GPT, OPT, OWN, read_tensors
from .own_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Build,
    M,
    assemble,
    expected_shapes,
    read_own,
)
from .recognise import recognise
from .safetensors_file import SafetensorsFiles, TensorSource, header_limit

INDEX_FILE = "model.safetensors.index.json"
LAYOUTS = {"gpt2": GPT2, "openai-gpt": OPENAI_GPT, "opt": OPT, "mixtral": MIXTRAL, OWN_TYPE: OWN}


def load_pretrained(
    build: Callable[[GPT2Config], M],
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    wanted: Mapping[str, Any],
) -> M:
    """见 GPT2Model.from_pretrained。"""
    folder = find_folder(source)
    check_no_adapter(folder)
    raw = recognise(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    if isinstance(raw, dict) and "model_type" in raw:
        config, tensors = read_foreign(build, raw, folder)
    else:
        try:
            config = GPT2Config.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        version = raw.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            config = agree(config, wanted, str(source))
            return cast(M, find_loader(version, folder)(config, folder, device, dtype))
        tensors = read_own(build, config, folder)
    config = agree(config, wanted, str(source))
    return assemble(build, config, tensors, device, dtype)


def read_foreign(
    build: Build,
    raw: dict[str, Any],
    folder: Path,
    open_source: Callable[[Path, int], TensorSource] | None = None,
) -> tuple[GPT2Config, Iterable[tuple[str, Tensor]]]:
    """Hugging Face 的文件夹：译好的配置，与逐个读出的张量。

    open_source(folder, 预期至多多少个张量) 另给权重；None = 文件夹里的 safetensors。

    Raises:
        ValueError: 配置没有对应物，没有 safetensors，或权重不合配置。
    """
    where = str(folder / CONFIG_FILE)
    stored = read_config(raw, where)
    extra = extra_vocab(raw, stored, where)
    config = stored.replace(vocab_size=stored.vocab_size - extra)
    expected = expected_shapes(build, config)
    # 旧文件每层多存两个掩码，OPT 把 q、k、v 分开，专家各自存放。
    most = 3 * len(expected) * max(1, config.moe_num_experts)
    source = (open_source or open_shards)(folder, most)
    return config, read_tensors(LAYOUTS[raw["model_type"]], config, expected, source, extra)


def _check_agrees(name: str, value: Any, found: Any, where: str) -> None:
    if value == found or name in marked(GPT2Config, Mark.FREE):
        return
    why = "; Pre-LN and Post-LN weights are not interchangeable" if name == "norm" else ""
    raise ValueError(
        f"{name}={value!r} was asked for but the weights of {where} have {name}={found!r}"
        f"{why}: use {name}={found!r} or leave it out"
    )


def open_shards(folder: Path, most: int) -> TensorSource:
    """
    Raises:
        ValueError: 没有 safetensors，索引不对，或头不对。
    """
    return SafetensorsFiles(_shards(folder), header_limit(most))


def agree(config: GPT2Config, wanted: Mapping[str, Any], where: str) -> GPT2Config:
    """用户点名的字段要与权重的相符；不改变权重的意思的（Mark.FREE）则照用户的。

    Raises:
        ValueError: 不相符（点名两个值），或没有这个字段。
    """
    try:
        asked = GPT2Config.from_dict({**config.to_dict(), **wanted})
    except ValueError:
        # 与别的字段凑不成一份配置，多半只因为它不是权重的那个值。
        for name in wanted.keys() & config.to_dict().keys():
            _check_agrees(name, wanted[name], getattr(config, name), where)
        raise
    for name in differing(asked, config):
        get = attrgetter(name)
        _check_agrees(name, get(asked), get(config), where)
    return asked


def _shards(folder: Path) -> list[Path]:
    """
    Raises:
        ValueError: 没有 safetensors（只有 pickle 时点名要用的命令），或索引不对。
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        return listed(index, ".safetensors")
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt") for p in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} has no {WEIGHTS_FILE}, only {pickled[0]}, a pickle that could run code: "
            f"if you trust it, `gpt2 import {folder} --allow-pickle --out NEW` reads it"
        )
    others = sorted(p.name for pattern in ("*.safetensors", "*.gguf") for p in folder.glob(pattern))
    if others:
        raise ValueError(
            f"{folder} has no {WEIGHTS_FILE} but {others[0]}: a single safetensors file is read "
            f"with `gpt2 import {folder / others[0]} --out NEW`"
        )
    raise ValueError(f"{folder} has no {WEIGHTS_FILE}: it is not a saved model")


def listed(index: Path, suffix: str) -> list[Path]:
    """索引点名的分片，都在同一个文件夹里。

    Raises:
        ValueError: 索引读不懂，点名的不是旁边的文件，或缺了。
    """
    folder, kind = index.parent, suffix.removeprefix(".")
    raw = read_json(index)
    files = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map")
    names = list(dict.fromkeys(files.values()))
    for name in names:
        # 只许同一文件夹里的普通文件名：../ 与绝对路径都不是。
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(suffix):
            raise ValueError(f"{index}: {str(name)[:60]!r} is not a {kind} file beside it")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, which {index.name} lists")
    return [folder / name for name in names]

"""别处的权重变成我们的文件夹：hub、Hugging Face 的文件夹，明说了才有的旧 pickle 与 nanoGPT。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.data.tokenizers import Tokenizer, load_tokenizer
from app.interop.hf import write_folder
from app.interop.pickles import LoadedTensors, load_pickle
from app.interop.tokens import read_hub_tokenizer
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.json_file import read_json
from app.models.transformer.weights.families import extra_vocab, read_config
from app.models.transformer.weights.hub import MODEL_FILES, TOKENIZER_FILES, find_folder
from app.models.transformer.weights.layouts import NANOGPT, read_tensors
from app.models.transformer.weights.own_folder import CONFIG_FILE, assemble, expected_shapes
from app.models.transformer.weights.pretrained import LAYOUTS, agree, load_pretrained

PICKLE_FILE = "pytorch_model.bin"
# nanoGPT 的 model_args -> 我们的字段。
_NANOGPT_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embed",
    "bias": "bias",
    "dropout": "dropout",
}


@dataclass(frozen=True)
class Imported:
    """tokenizer 为 None 时 why 说明原因：权重照样能用，文字则要用对方的分词器编码。"""

    model: GPT2Model
    tokenizer: Tokenizer | None
    why: str = ""


def import_model(
    source: str,
    *,
    allow_pickle: bool = False,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> Imported:
    """
    Args:
        source: 文件夹、hub 上的名字，或 nanoGPT 的 ckpt.pt（要 allow_pickle）。
        tokenizer: 另一个文件夹，用它的分词器；None = source 自己的。
        wanted: 见 GPT2Model.from_pretrained。

    Raises:
        ValueError: 找不到、读不懂、不安全，或与 wanted 不符。
    """
    wanted = wanted or {}
    path = Path(source)
    if path.is_file():
        model = _nanogpt(path, allow_pickle, dtype, wanted)
        return _with_tokenizer(model, tokenizer, path)
    files = (*MODEL_FILES, *TOKENIZER_FILES, *((PICKLE_FILE,) if allow_pickle else ()))
    folder = find_folder(source, files)
    safe = any(folder.glob("*.safetensors"))
    if allow_pickle and not safe and (folder / PICKLE_FILE).is_file():
        model = _pickled(folder, dtype, wanted)
    else:
        model = load_pretrained(GPT2Model, folder, torch.device("cpu"), dtype, wanted)
    return _with_tokenizer(model, tokenizer, folder)


def write_model(imported: Imported, folder: Path) -> None:
    """
    Raises:
        ValueError: folder 已有东西。
    """

    def fill(new: Path) -> None:
        imported.model.save_pretrained(new)
        if imported.tokenizer is not None:
            imported.tokenizer.save(new)

    write_folder(folder, fill)


def _with_tokenizer(model: GPT2Model, given: Path | None, source: Path) -> Imported:
    tokenizer: Tokenizer | None
    why = ""
    if given is not None:
        ours = (given / "tokenizer_meta.json").is_file()
        tokenizer = load_tokenizer(given) if ours else read_hub_tokenizer(given)
    elif source.is_dir():
        tokenizer, why = _tokenizer(source)
    else:
        return Imported(model, None, "a checkpoint of nanoGPT has none; give --tokenizer")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{given or source}: the tokenizer has {tokenizer.vocab_size} ids but the model only "
            f"vocab_size={model.config.vocab_size}: they do not belong together"
        )
    return Imported(model, tokenizer, why)


def _tokenizer(folder: Path) -> tuple[Tokenizer | None, str]:
    """坏的分词器是错；没有、或是这里没有的一种，只是没有。"""
    if (folder / "tokenizer_meta.json").is_file():
        return load_tokenizer(folder), ""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return None, f"{folder} holds no tokenizer"
    kind = read_json(folder / CONFIG_FILE).get("model_type")
    try:
        return read_hub_tokenizer(folder), ""
    except ValueError as error:
        if kind in ("openai-gpt", "opt"):
            # GPT-1 的 BPE 按词尾切，OPT 的 id 不按合并的次序：都不是这里的字节级 BPE。
            return None, str(error)
        raise


def _pickled(folder: Path, dtype: torch.dtype | None, wanted: Mapping[str, Any]) -> GPT2Model:
    raw = read_json(folder / CONFIG_FILE)
    where = str(folder / CONFIG_FILE)
    stored = read_config(raw, where)
    extra = extra_vocab(raw, stored, where)
    config = stored.replace(vocab_size=stored.vocab_size - extra)
    path = folder / PICKLE_FILE
    source = LoadedTensors(str(path), _state(load_pickle(path), str(path)))
    expected = expected_shapes(GPT2Model, config)
    tensors = read_tensors(LAYOUTS[raw["model_type"]], config, expected, source, extra)
    config = agree(config, wanted, str(folder))
    return assemble(GPT2Model, config, tensors, torch.device("cpu"), dtype)


def _nanogpt(
    path: Path, allow_pickle: bool, dtype: torch.dtype | None, wanted: Mapping[str, Any]
) -> GPT2Model:
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which could run code: if you trust it, give --allow-pickle "
            "(it is read with weights_only=True and size limits)"
        )
    data = load_pickle(path)
    args = data.get("model_args") if isinstance(data, dict) else None
    if not isinstance(args, dict) or "model" not in data:
        raise ValueError(f"{path} is no checkpoint of nanoGPT: it has no 'model' and 'model_args'")
    known = {ours: args[theirs] for theirs, ours in _NANOGPT_ARGS.items() if theirs in args}
    missing = [theirs for theirs in _NANOGPT_ARGS if theirs not in args and theirs != "dropout"]
    if missing:
        raise ValueError(f"{path}: its model_args lack {', '.join(missing)}")
    config = GPT2Config(norm="pre", **known)
    source = LoadedTensors(str(path), _state(data["model"], str(path)))
    expected = expected_shapes(GPT2Model, config)
    tensors = read_tensors(NANOGPT, config, expected, source)
    config = agree(config, wanted, str(path))
    return assemble(GPT2Model, config, tensors, torch.device("cpu"), dtype)


def _state(data: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in data.items()
    ):
        raise ValueError(f"{where}: not a mapping of names to tensors")
    return data

"""nanoGPT、build-nanogpt 的检查点与光秃秃的 state_dict：结构从 model_args 或形状来。

文件里没有的（光秃秃的没有头数，谁也不写激活函数）要用户说，猜错了只会悄悄错一点。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.data.tokenizers import CharTokenizer
from app.interop.reading.pickles import LoadedTensors, Settings, load_plain, tensors_of
from app.models.transformer import GPT2Config
from app.models.transformer.weights.layouts import GPT2, HEAD, NANOGPT, Layout, find_prefix

# nanoGPT 的 model_args -> 我们的字段。
_ARGS = {
    "vocab_size": "vocab_size",
    "block_size": "context_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embed",
    "bias": "bias",
    "dropout": "dropout",
}
_WEIGHTS = ("model", "state_dict", "model_state_dict")
META_FILE = "meta.pkl"


@dataclass(frozen=True)
class Checkpoint:
    """读懂了的检查点；hint 是给 --tokenizer 的话。"""

    config: GPT2Config
    layout: Layout
    source: LoadedTensors
    notes: tuple[str, ...] = ()
    hint: str = ""


def open_checkpoint(path: Path, data: Any, wanted: Mapping[str, Any]) -> Checkpoint:
    """
    Args:
        data: load_pickle 得到的。
        wanted: 用户点名的字段；n_head 与 activation 在文件没写时由它们定。

    Raises:
        ValueError: 没有张量，缺了结构的某一项，或值越界。
    """
    where = str(path)
    if not isinstance(data, dict):
        raise ValueError(f"{where} holds a {type(data).__name__}, not a mapping of tensors")
    inner = next((data[name] for name in _WEIGHTS if isinstance(data.get(name), dict)), None)
    source = LoadedTensors(where, tensors_of(data if inner is None else inner, where))
    args = data.get("model_args") if inner is not None else None
    own = data.get("config") if inner is not None else None
    if isinstance(args, dict):
        return _nanogpt(args, own, source, wanted)
    if isinstance(own, Settings):
        # build-nanogpt 存的是它的配置对象；它的 GELU 是 tanh 近似，线性层总有偏置。
        return _built(vars(own), source)
    return _bare(source, wanted)


def _nanogpt(
    args: dict[str, Any], settings: Any, source: LoadedTensors, wanted: Mapping[str, Any]
) -> Checkpoint:
    missing = [theirs for theirs in _ARGS if theirs not in args and theirs != "dropout"]
    if missing:
        raise ValueError(f"{source.where}: its model_args lack {', '.join(missing)}")
    unknown = sorted(args.keys() - _ARGS.keys())
    if unknown:
        raise ValueError(
            f"{source.where}: its model_args have {', '.join(unknown)}, which nanoGPT does not: "
            "it comes from a changed nanoGPT, whose blocks may compute something else"
        )
    activation = wanted.get("activation") or "gelu"
    known = {ours: args[theirs] for theirs, ours in _ARGS.items() if theirs in args}
    notes = () if wanted.get("activation") else (
        "activation 'gelu', as nanoGPT's nn.GELU(): the file does not say; its versions before "
        "mid 2023 computed the tanh form, --activation gelu_tanh",
    )  # fmt: skip
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    hint = ""
    if isinstance(dataset, str) and dataset.isidentifier():
        hint = f"; it was trained on data/{dataset}: where that has a {META_FILE}, give that file"
    return Checkpoint(_config(source, known, activation, NANOGPT), NANOGPT, source, notes, hint)


def _built(settings: dict[str, Any], source: LoadedTensors) -> Checkpoint:
    needed = [theirs for theirs in _ARGS if theirs not in ("bias", "dropout")]
    missing = [theirs for theirs in needed if theirs not in settings]
    if missing:
        raise ValueError(f"{source.where}: its config lacks {', '.join(missing)}")
    known = {_ARGS[theirs]: settings[theirs] for theirs in needed}
    known |= {"bias": True, "dropout": 0.0}
    return Checkpoint(_config(source, known, "gelu_tanh", NANOGPT), NANOGPT, source)


def _bare(source: LoadedTensors, wanted: Mapping[str, Any]) -> Checkpoint:
    prefix = find_prefix(GPT2, source)
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in source.shapes.items()
        if name.startswith(prefix)
    }
    layers = {name.split(".")[1] for name in shapes if name.startswith("h.")}
    table, places = shapes["wte.weight"], shapes.get("wpe.weight", ())
    joined = shapes.get("h.0.attn.c_attn.weight", ())
    if len(table) != 2 or len(places) != 2 or len(joined) != 2:
        raise ValueError(
            f"{source.where}: tensors without a config, and not those of a GPT-2 (wte, wpe, "
            "h.0.attn.c_attn): put its config.json beside it"
        )
    missing = [name for name in ("n_head", "activation") if wanted.get(name) is None]
    if missing:
        options = " ".join(f"--{name.replace('_', '-')} ..." for name in missing)
        raise ValueError(
            f"{source.where} holds tensors only, so {' and '.join(missing)} cannot be known: "
            f"give {options} (GPT-2 has heads of width 64, here --n-head {table[1] // 64}, and "
            "gelu_tanh; nanoGPT has gelu), or put its config.json beside it"
        )
    known = {
        "vocab_size": table[0], "context_size": places[0], "n_layer": len(layers),
        "n_embed": table[1], "n_head": wanted["n_head"], "dropout": 0.0,
        "bias": "h.0.ln_1.bias" in shapes,
    }  # fmt: skip
    # 线性层存 (out, in)，Conv1D 存 (in, out)：宽的一边说明是哪一种。
    layout = NANOGPT if joined[0] > joined[1] else GPT2
    return Checkpoint(_config(source, known, wanted["activation"], layout), layout, source)


def _config(
    source: LoadedTensors, known: dict[str, Any], activation: Any, layout: Layout
) -> GPT2Config:
    prefix = find_prefix(layout, source)
    return GPT2Config.from_dict(
        {**known, "norm": "pre", "activation": activation, "tie_weights": _tied(source, prefix)}
    )


def _tied(source: LoadedTensors, prefix: str) -> bool:
    """没有配置可问：头在文件里而与嵌入不同，就是不共享。"""
    heads = [name for name in source.shapes if name.endswith(HEAD)]
    table = source.read(f"{prefix}wte.weight")
    return not heads or all(torch.equal(source.read(name), table) for name in heads)


def read_meta(path: Path) -> CharTokenizer:
    """nanoGPT 的字符表（meta.pkl）；它没有分隔符，模型也没有那一行。

    Raises:
        ValueError: 不是它的样子，或有不止一个字符的词元。
    """
    data = load_plain(path)
    table = data.get("itos") if isinstance(data, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: no alphabet there ('itos'), so it is no {META_FILE} of nanoGPT")
    characters = [table.get(number) for number in range(len(table))]
    bad = next((c for c in characters if not isinstance(c, str) or len(c) != 1), None)
    if bad is not None or None in characters:
        raise ValueError(
            f"{path}: itos must give one character for each id from 0 to {len(table) - 1}, "
            f"got {bad!r}"
        )
    texts = [str(c) for c in characters]
    if data.get("stoi", dict(zip(texts, range(len(texts)), strict=True))) != {
        text: number for number, text in enumerate(texts)
    }:
        raise ValueError(f"{path}: stoi is not the inverse of itos")
    return CharTokenizer(texts, separator=False)

"""模型文件夹的读写：config.json + model.safetensors，没有 pickle。

读之前先只看文件头：大小、名字、形状、类型与偏移都要与配置推出的一致，才分配内存。
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import GPT2Config

if TYPE_CHECKING:
    from .model import GPT2Model

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def save_model(model: GPT2Model, folder: Path) -> None:
    from safetensors.torch import save_file

    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder to save the model in")
    folder.mkdir(parents=True, exist_ok=True)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device and has no weights to save")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS_FILE)
    temporary = folder / f".{CONFIG_FILE}.{os.getpid()}"
    temporary.write_text(model.config.to_json(), encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def load_model(
    cls: type[GPT2Model], folder: Path, device: torch.device, dtype: torch.dtype | None
) -> GPT2Model:
    from safetensors.torch import load_file

    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: it is not a saved model")
    check_header(read_header(path), config, path)
    with torch.device("meta"):
        model = cls(config)
    state = load_file(path, device=str(device))
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_config(folder: Path) -> GPT2Config:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder with a saved model")
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}: it is not a saved model")
    return GPT2Config.from_file(path)


def read_header(path: Path) -> dict[str, Any]:
    """safetensors 的头：8 字节小端长度，然后是 JSON。长度不可信，先设上限再读。"""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: a header of {length} bytes in a file of {size} bytes (limit "
                f"{_MAX_HEADER_BYTES}): the file is truncated or no safetensors file"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is broken: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a mapping")
    header.pop("__metadata__", None)
    end = check_layout(header, path)
    if 8 + length + end != size:
        raise ValueError(f"{path}: has {size} bytes but its header describes {8 + length + end}")
    return header


# XL 有 580 个张量、头约 60 KB；4096 层的上限也不到 8 MB。
_MAX_HEADER_BYTES = 8 << 20


def check_layout(header: dict[str, Any], path: Path) -> int:
    """各张量首尾相接、不重叠、大小与形状相符；返回数据的总字节数。"""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            ok = dtype in _BYTES and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            count = _BYTES[dtype]
            for n in shape:
                count *= n
            ok = ok and end - begin == count
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            raise ValueError(f"{path}: the header entry of tensor {name!r} is not valid")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: tensor {name!r} starts at {begin}, expected {position}")
        position = end
    return position


def check_header(header: dict[str, Any], config: GPT2Config, path: Path) -> None:
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - header.keys())
    extra = sorted(header.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config (norm={config.norm!r}, n_layer={config.n_layer}): "
            f"{len(missing)} tensors missing {missing[:3]}, {len(extra)} unknown {extra[:3]}: "
            "the weights belong to another configuration"
        )
    for name, shape in expected.items():
        if tuple(header[name]["shape"]) != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(header[name]['shape'])} but the config says "
                f"{shape}: the weights belong to another configuration"
            )


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """配置推出的名字与形状，缓冲区也算。

    只在 meta 设备上造两层：第 0 层可能特殊（keel），其余都像第 1 层；有 MoE 层时，全是稠密层的与
    全是 MoE 层的各造一次。图样没有权重，而两层放不下更长的循环，所以换成默认的。
    """
    plain = config.replace(attention_pattern=None, use_sparse_attention=False)
    few = min(config.n_layer, 2)
    dense, mixed = _shapes(plain.dense().replace(n_layer=few)), {}
    if config.moe_layers:
        mixed = _shapes(plain.with_layers(few, range(few)))
    shapes = {name: shape for name, shape in dense.items() if not name.startswith("h.")}
    for layer in range(config.n_layer):
        like = f"h.{min(layer, 1)}."
        for name, shape in (mixed if layer in config.moe_layers else dense).items():
            if name.startswith(like):
                shapes[f"h.{layer}.{name.removeprefix(like)}"] = shape
    return shapes


def _shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    from .model import GPT2Model

    with torch.device("meta"):
        small = GPT2Model(config)
    return {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result

"""我们自己的模型文件夹：config.json + model.safetensors，没有 pickle。

读之前先只看文件头：大小、名字、形状、类型与偏移都要与配置推出的一致，才分配内存。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..config import GPT2Config
from .safetensors_file import (
    SafetensorsFiles,
    TensorSource,
    header_limit,
    write_tensors_file,
)

M = TypeVar("M", bound=nn.Module)
# 由配置造出模型的东西：模型的类自己。这里不认得是哪个类。
Build = Callable[[GPT2Config], nn.Module]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Savable(Protocol):
    @property
    def config(self) -> GPT2Config: ...

    def state_dict(self) -> dict[str, Any]: ...


def save_model(model: Savable, folder: Path) -> None:
    save_with(model, folder, {CONFIG_FILE: model.config.to_json()})


def save_with(model: Savable, folder: Path, texts: Mapping[str, str]) -> None:
    """先写权重，再按次序写 texts（文件名 -> 内容）。

    Raises:
        ValueError: folder 是一个文件，或模型在 meta 设备上。
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder to save the model in")
    folder.mkdir(parents=True, exist_ok=True)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device and has no weights to save")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    _replace(folder / WEIGHTS_FILE, lambda path: write_tensors_file(state, path))
    for name, text in texts.items():
        _replace(folder / name, _writing(text))


def _writing(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """写在旁边再改名：写到一半断了，旧文件还在。"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_own(build: Build, config: GPT2Config, folder: Path) -> Iterable[tuple[str, Tensor]]:
    """save_model 写的权重，逐个；返回之前已核对完名字与形状。

    Raises:
        ValueError: 没有权重文件，或它不合配置。
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: it is not a saved model")
    expected = expected_shapes(build, config)
    source = SafetensorsFiles([path], header_limit(len(expected)))
    check_shapes(source, expected, config)
    return ((name, source.read(name)) for name in expected)


def assemble(
    build: Callable[[GPT2Config], M],
    config: GPT2Config,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> M:
    """在 meta 设备上造模型，张量逐个换好精度放进去：任何时刻至多比模型多一个张量。"""
    with torch.device("meta"):
        model = build(config)
    state = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in tensors}
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_shapes(
    source: TensorSource, expected: dict[str, tuple[int, ...]], config: GPT2Config
) -> None:
    missing = sorted(expected.keys() - source.shapes.keys())
    extra = sorted(source.shapes.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{source.where} does not fit its config (norm={config.norm!r}, "
            f"n_layer={config.n_layer}): {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}: the weights belong to another configuration"
            + _norm_hint(config, missing, extra)
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise ValueError(
                f"{source.where}: {name} has shape {source.shapes[name]} but the config says "
                f"{shape}: the weights belong to another configuration"
            )


def _norm_hint(config: GPT2Config, missing: list[str], extra: list[str]) -> str:
    """末尾的归一化只有 pre 有：多了或少了它，多半是归一化的位置写错了。"""
    if any(name.startswith("ln_f.") for name in extra):
        return f". They have a final norm: norm='pre' (GPT-2's), not norm={config.norm!r}"
    if any(name.startswith("ln_f.") for name in missing):
        return ". They have no final norm: norm='post' or 'deepnorm', not norm='pre'"
    return ""


def expected_shapes(build: Build, config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """配置推出的名字与形状，缓冲区也算。

    只在 meta 设备上造两层：第 0 层可能特殊（keel），其余都像第 1 层；有 MoE 层时，全是稠密层的与
    全是 MoE 层的各造一次。图样没有权重，而两层放不下更长的循环，所以换成默认的。
    """
    plain = config.replace(attention_pattern=None, use_sparse_attention=False)
    few = min(config.n_layer, 2)
    dense, mixed = _shapes(build, plain.dense().replace(n_layer=few)), {}
    if config.moe_layers:
        mixed = _shapes(build, plain.with_layers(few, range(few)))
    shapes = {name: shape for name, shape in dense.items() if not name.startswith("h.")}
    for layer in range(config.n_layer):
        like = f"h.{min(layer, 1)}."
        for name, shape in (mixed if layer in config.moe_layers else dense).items():
            if name.startswith(like):
                shapes[f"h.{layer}.{name.removeprefix(like)}"] = shape
    return shapes


def _shapes(build: Build, config: GPT2Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        small = build(config)
    return {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}

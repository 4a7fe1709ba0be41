"""量化的模型文件夹：config.json（schema_version 2）、quantization.json、model.safetensors。

存的只有规范的码与尺度；内核怎么打包随机器而变，装载之后再做。读之前先只看文件头：名字、类型、
形状都要与两个 JSON 推出的一致，才分配内存。装载从不造一份浮点的矩阵。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.config import GPT2Config
from app.models.transformer.settings.json_file import read_json
from app.models.transformer.weights.own_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    expected_shapes,
)
from app.models.transformer.weights.safetensors_file import SafetensorsFiles, header_limit

from .codes import Codes, Scheme
from .model import QuantizedModel, matrices
from .stored import QUANTIZATION_FILE, VERSION

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def load_quantized(
    config: GPT2Config, folder: Path, device: torch.device, dtype: torch.dtype | None
) -> QuantizedModel:
    """GPT2Model.from_pretrained 遇到 schema_version 2 时走这里。

    Raises:
        ValueError: 要别的精度，文件不全、不合，或码与尺度不对；点名文件、张量与改法。
    """
    if dtype not in (None, torch.float32):
        raise ValueError(
            f"dtype={dtype} was asked for but {folder} is quantized and computes in float32: "
            "leave dtype out, or load the float model it was made from"
        )
    method, schemes = read_schemes(config, folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: it is not a saved model")
    expected = expected_tensors(config, schemes)
    source = SafetensorsFiles([path], header_limit(len(expected)))
    _check_header(source, expected)
    codes = dict(_read_codes(source, config, schemes, device))
    model = QuantizedModel(config, codes, method)
    state = {f"{n}.{kind}": t for n, each in codes.items() for kind, t in each.tensors().items()}
    for name in expected.keys() - state.keys():
        state[name] = source.read(name).to(device)
    model.load_state_dict(state, assign=True)
    return model


def expected_tensors(config: GPT2Config, schemes: Mapping[str, Scheme]) -> Expected:
    """文件里该有的每个张量：{名字: (类型, 形状)}。"""
    found: Expected = {}
    for name, shape in expected_shapes(GPT2Model, config).items():
        if name in schemes:
            parts = schemes[name].stored(shape).items()
            found |= {f"{name}.{kind}": part for kind, part in parts}
        else:
            found[name] = (torch.float32, shape)
    return found


def read_schemes(config: GPT2Config, folder: Path) -> tuple[str, dict[str, Scheme]]:
    """quantization.json：(方法, {矩阵: 存法})。

    Raises:
        ValueError: 没有它，版本是将来的，或与配置的矩阵对不上。
    """
    path = folder / QUANTIZATION_FILE
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        version = raw.get("version") if isinstance(raw, dict) else None
        raise ValueError(
            f"{path}: version={version!r} but this version reads {VERSION}: update the package or "
            "quantize the model again"
        )
    method, groups = raw.get("method"), raw.get("schemes")
    if not isinstance(method, str) or not isinstance(groups, list):
        raise ValueError(f"{path}: method must be a text and schemes a list")
    schemes: dict[str, Scheme] = {}
    for each in groups:
        scheme, names = _scheme(each, path)
        for name in names:
            if name in schemes:
                raise ValueError(f"{path}: {name!r} is listed twice")
            schemes[name] = scheme
    _check_names(config, schemes, path)
    return method, schemes


def _scheme(raw: Any, path: Path) -> tuple[Scheme, list[str]]:
    known = {"bits", "group", "asymmetric", "matrices"}
    if not isinstance(raw, dict) or raw.keys() - known:
        raise ValueError(f"{path}: a scheme has {sorted(known)}, got {str(raw)[:80]}")
    names = raw.get("matrices")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: matrices must be a list of names, got {str(names)[:80]}")
    try:
        scheme = Scheme(raw.get("bits", 0), raw.get("group", 0), raw.get("asymmetric", False))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return scheme, names


def _check_names(config: GPT2Config, schemes: Mapping[str, Scheme], path: Path) -> None:
    wanted = matrices(config)
    missing = sorted(wanted.keys() - schemes.keys())
    extra = sorted(schemes.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config: {len(missing)} matrices missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}"
        )
    for name, scheme in schemes.items():
        try:
            scheme.check_width(wanted[name][-1], name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_header(source: SafetensorsFiles, expected: Expected) -> None:
    missing = sorted(expected.keys() - source.shapes.keys())
    extra = sorted(source.shapes.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{source.where} does not fit {QUANTIZATION_FILE}: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(extra)} unknown {extra[:3]}"
        )
    for name, wanted in expected.items():
        found = source.dtype(name), source.shapes[name]
        if found != wanted:
            raise ValueError(
                f"{source.where}: {name} is {found[0]} {found[1]} but {QUANTIZATION_FILE} and "
                f"{CONFIG_FILE} say {wanted[0]} {wanted[1]}"
            )


def _read_codes(
    source: SafetensorsFiles,
    config: GPT2Config,
    schemes: Mapping[str, Scheme],
    device: torch.device,
) -> Iterable[tuple[str, Codes]]:
    for name, shape in matrices(config).items():
        scheme = schemes[name]
        parts = {kind: source.read_raw(f"{name}.{kind}") for kind in scheme.stored(shape)}
        try:
            _made(scheme, parts).check(name)
        except ValueError as error:
            raise ValueError(f"{source.where}: {error}") from None
        yield name, _made(scheme, {kind: t.to(device) for kind, t in parts.items()})


def _made(scheme: Scheme, parts: Mapping[str, Tensor]) -> Codes:
    return Codes(
        scheme.bits, parts["codes"], parts.get("scale"), parts.get("minimum"), scheme.group
    )

"""适配器的文件：adapter_model.safetensors、adapter_config.json（PEFT 的），与我们的 base.json。

base.json 记原模型在哪里、权重的 sha256：原模型不复制，换了就认得出。
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.common.files import sha256_file
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.json_file import read_json
from app.models.transformer.settings.tune_config import TuneConfig
from app.models.transformer.weights.layouts import GPT2, OPENAI_GPT, OWN
from app.models.transformer.weights.own_folder import WEIGHTS_FILE, expected_shapes
from app.models.transformer.weights.safetensors_file import (
    SafetensorsFiles,
    header_limit,
    write_tensors_file,
)

from .adapter import Adapter
from .lora import TARGETS
from .names import PREFIX, is_transposed, theirs
from .rows import VOCABULARY

TENSORS, SETTINGS, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
_VERSION = 1
_ROWS = ".token_adapter.trainable_tokens_delta"
# PEFT 的设置里改变函数、而这里没有的：有值就拒绝，不当没看见。
_UNKNOWN = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """原模型。

    Attributes:
        path: 绝对路径；relative: 相对于适配器所在的文件夹，两者一起搬走也找得到。
    """

    path: str
    relative: str
    sha256: str

    @classmethod
    def of(cls, base: Path, adapter: Path) -> Base:
        path = base.resolve()
        relative = os.path.relpath(path, adapter.resolve())
        return cls(str(path), relative, sha256_file(path / WEIGHTS_FILE))


def is_adapter(folder: Path) -> bool:
    """只有适配器，没有整份的权重。"""
    return (folder / SETTINGS).is_file() and not (folder / WEIGHTS_FILE).is_file()


def write_adapter(adapter: Adapter, config: GPT2Config, tune: TuneConfig, folder: Path) -> None:
    """两个 PEFT 的文件，PEFT 直接装得起。

    Raises:
        OSError: 写不下。
    """
    write_tensors_file(dict(_to_peft(adapter, config)), folder / TENSORS)
    stacked = [name for name, (a, _) in adapter.pairs.items() if a.ndim == 3]
    plain = [name for name in adapter.pairs if name not in stacked]
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": tune.lora_rank,
        "lora_alpha": tune.lora_alpha,
        "lora_dropout": tune.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": is_transposed(config),
        "target_modules": sorted({_end(name) for name in plain}),
        "target_parameters": sorted({f"{_end(name)}.weight" for name in stacked}) or None,
        "trainable_token_indices": {
            theirs(config, name).rpartition(".")[2]: list(adapter.new) for name in adapter.rows
        }
        or None,
    }
    _write_json(folder / SETTINGS, settings)


def write_base(base: Base, folder: Path) -> None:
    _write_json(folder / BASE, {"version": _VERSION, **asdict(base)})


def read_base(folder: Path) -> Base | None:
    """没有 base.json（PEFT 自己写的）则 None。

    Raises:
        ValueError: 读不懂。
    """
    path = folder / BASE
    if not path.is_file():
        return None
    raw = read_json(path)
    known = {"path", "relative", "sha256"}
    if not isinstance(raw, dict) or raw.get("version") != _VERSION or not known <= raw.keys():
        raise ValueError(f"{path} is not a {BASE} of version {_VERSION}: train the adapter again")
    return Base(*(str(raw[key]) for key in ("path", "relative", "sha256")))


def read_adapter(folder: Path, config: GPT2Config) -> Adapter:
    """config 是原模型的。

    Raises:
        ValueError: 不是 LoRA，设置里有这里没有的，或张量不合这个模型；点名文件、两个值。
    """
    settings = _settings(folder / SETTINGS)
    tensors, where = _read_tensors(folder / TENSORS), str(folder / TENSORS)
    shapes = expected_shapes(GPT2Model, config)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in _names(config, shapes).items():
        a, b = (tensors.pop(f"{PREFIX}{name}.lora_{x}.weight", None) for x in "AB")
        if a is not None and b is not None:
            pairs[module] = _from_peft(a, b, shapes[f"{module}.weight"], f"{where}: {module}")
    new, rows = _read_rows(settings, tensors, config, where)
    if tensors or not pairs:
        raise ValueError(
            f"{where} does not fit the base (norm={config.norm}, n_layer={config.n_layer}): "
            f"{len(tensors)} unknown tensors {sorted(tensors)[:2]}, {len(pairs)} adapters found"
        )
    rank = settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"]
    return Adapter(pairs, settings["lora_alpha"] / rank, new, rows)


def _settings(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise ValueError(
            f"{path}: peft_type={kind!r} but only LORA adapters are read here: merge it with PEFT "
            "(merge_and_unload, save_pretrained) and import the result"
        )
    odd = [key for key in _UNKNOWN if raw.get(key)]
    odd += ["bias"] if raw.get("bias", "none") != "none" else []
    if odd:
        raise ValueError(
            f"{path}: {odd[0]}={raw[odd[0]]!r} has no counterpart here: merge it with PEFT "
            "(merge_and_unload, save_pretrained) and import the result"
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
    return raw


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: an adapter is {SETTINGS} and {TENSORS} together")
    source = SafetensorsFiles([path], header_limit(100_000))
    return {name: source.read(name) for name in source.shapes}


def _names(config: GPT2Config, shapes: Mapping[str, Any]) -> dict[str, str]:
    """{那边的模块名: 我们的}，凡可能的几种写法：带头的模型、主干、我们自带代码的。"""
    ends = tuple(f".{end}.weight" for group in TARGETS.values() for end in group)
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(ends)]
    found = {theirs(config, module): module for module in modules}
    for layout in (GPT2, OPENAI_GPT, OWN):
        for prefix in layout.prefixes:
            found |= {prefix + module: module for module in modules}
    return found


def _read_rows(
    settings: Mapping[str, Any], tensors: dict[str, Tensor], config: GPT2Config, where: str
) -> tuple[range, dict[str, Tensor]]:
    """取走 tensors 里新词元的行。"""
    rows = {}
    for name in VOCABULARY:
        found = tensors.pop(f"{PREFIX}{theirs(config, name)}{_ROWS}", None)
        if found is not None:
            rows[name] = found
    if not rows:
        return range(0), {}
    given = settings.get("trainable_token_indices")
    lists = list(given.values()) if isinstance(given, dict) else [given]
    ids = lists[0]
    new = range(ids[0], ids[-1] + 1) if isinstance(ids, list) and ids else range(0)
    count = {len(x) for x in rows.values()}
    if any(list(new) != each for each in lists) or count != {len(new)}:
        raise ValueError(
            f"{where}: rows of the tokens {str(given)[:60]}: only one run of ids, the same for "
            "embedding and head, can be merged here"
        )
    return new, rows


def _to_peft(adapter: Adapter, config: GPT2Config) -> Iterator[tuple[str, Tensor]]:
    for module, (a, b) in adapter.pairs.items():
        if a.ndim == 3:
            # PEFT 的叠法：A (E·r, I)，B (O, r·E)，E 在最里面。
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        name = PREFIX + theirs(config, module)
        yield f"{name}.lora_A.weight", a.cpu().contiguous()
        yield f"{name}.lora_B.weight", b.cpu().contiguous()
    for module, rows in adapter.rows.items():
        yield f"{PREFIX}{theirs(config, module)}{_ROWS}", rows.cpu().contiguous()


def _from_peft(a: Tensor, b: Tensor, shape: tuple[int, ...], where: str) -> tuple[Tensor, Tensor]:
    *stack, rows, width = shape
    if stack and a.ndim == 2 and len(a) % stack[0] == 0 and b.shape == (rows, len(a)):
        a, b = a.view(stack[0], -1, width), b.view(rows, -1, stack[0]).permute(2, 0, 1)
    rank = a.shape[-2]
    if a.shape != (*stack, rank, width) or b.shape != (*stack, rows, rank):
        raise ValueError(
            f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit the weight {shape}"
        )
    return a, b.contiguous()


def _end(module: str) -> str:
    """模块名的末尾，PEFT 按它找层。"""
    return next(end for group in TARGETS.values() for end in group if module.endswith(f".{end}"))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

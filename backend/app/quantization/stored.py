"""写一个量化的模型文件夹；怎样读见 folder.py。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from app.models.transformer.config import QUANTIZED_VERSION, GPT2Config
from app.models.transformer.weights.own_folder import CONFIG_FILE, save_with

from .codes import Scheme

QUANTIZATION_FILE, VERSION = "quantization.json", 1


class Quantized(Protocol):
    """要写下的；见 QuantizedModel。"""

    method: str

    @property
    def config(self) -> GPT2Config: ...
    @property
    def schemes(self) -> Mapping[str, Scheme]: ...
    def state_dict(self) -> dict[str, Any]: ...


def save_quantized(model: Quantized, folder: Path) -> None:
    """每个文件先写在旁边再改名；config.json 最后，它说明旁边的是量化的。

    Raises:
        ValueError: folder 是一个文件。
        OSError: 写不下。
    """
    config = model.config.to_dict() | {"schema_version": QUANTIZED_VERSION}
    files = {QUANTIZATION_FILE: _facts(model), CONFIG_FILE: config}
    texts = {name: json.dumps(data, indent=2) + "\n" for name, data in files.items()}
    save_with(model, folder, texts)


def _facts(model: Quantized) -> dict[str, Any]:
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in model.schemes.items():
        groups.setdefault(scheme, []).append(name)
    return {
        "version": VERSION,
        "method": model.method,
        "schemes": [
            {"bits": s.bits, "group": s.group, "asymmetric": s.asymmetric, "matrices": names}
            for s, names in groups.items()
        ],
    }

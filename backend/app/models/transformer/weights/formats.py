"""别的房间登记的存法：主干不认得它们，from_pretrained 却要照样打开那样的文件夹。

config.json 的 schema_version 说是哪一种；谁来登记、为什么不在这里导入，见
docs/decisions/016-quantized-weights.md。
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..config import GPT2Config

    Loader = Callable[[GPT2Config, Path, torch.device, torch.dtype | None], nn.Module]

_LOADERS: dict[int, Loader] = {}


def register_loader(version: int, loader: Loader) -> None:
    """schema_version 为 version 的文件夹由 loader(config, folder, device, dtype) 打开。"""
    _LOADERS[version] = loader


def find_loader(version: int, folder: Path) -> Loader:
    """
    Raises:
        ValueError: 没有人登记过：只带了主干的一份代码里就没有。
    """
    if version not in _LOADERS:
        raise ValueError(
            f"{folder} has schema_version={version}: its weights are quantized and only the whole "
            "package (app.quantization) opens them; use that, or the float model"
        )
    return _LOADERS[version]

"""检查点的内容：权重、优化器、随机数、步数、配置与版本；只用 safetensors 与 JSON，没有 pickle。

学习率与取样器都是步数的纯函数，所以步数就是它们的状态。
"""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.weights.safetensors_file import write_tensors_file

from ..config import TrainConfig
from .checkpoint import SCHEMA_VERSION, CheckpointError

STATE, OPTIM = "state.json", "optim.safetensors"


def random_state() -> dict[str, Any]:
    """torch（各设备）、numpy、python 三家的随机数状态，可写成 JSON。"""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "numpy": [kind, np.asarray(keys).tobytes().hex(), int(position), int(has_gauss), gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(_bytes(state["torch"]))
    # 换了显卡数目时，能对上的照旧，其余由种子决定。
    for index, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes(text), index)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    array = np.frombuffer(bytes.fromhex(keys), dtype=np.uint32)
    np.random.set_state((kind, array, position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _hex(state: Tensor) -> str:
    return bytes(state.cpu().numpy().tobytes()).hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def versions() -> dict[str, str]:
    import safetensors

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def optimizer_tensors(model: GPT2Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """按 `状态名/参数名` 平铺；参数名而非编号，所以分组的次序变了也不会配错。"""
    return {
        f"{key}/{name}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: GPT2Model, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """
    Raises:
        CheckpointError: 有张量对不上模型的参数。
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters or value.shape not in (parameters[name].shape, torch.Size([])):
            raise CheckpointError(f"{OPTIM}: {key} does not fit the model")
        states.setdefault(name, {})[kind] = value
    layout = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {parameter: name for name, parameter in parameters.items()}
    layout["state"] = {i: states[names[p]] for i, p in enumerate(order) if names[p] in states}
    optimizer.load_state_dict(layout)


def write_tensors(folder: Path, model: GPT2Model, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        OSError: 写不下。
    """
    model.save_pretrained(folder)
    write_tensors_file(optimizer_tensors(model, optimizer), folder / OPTIM)


def read_tensors(folder: Path, model: GPT2Model, optimizer: torch.optim.Optimizer) -> None:
    load_weights(folder, model)
    read_optimizer(folder, model, optimizer)


def read_optimizer(folder: Path, model: GPT2Model, optimizer: torch.optim.Optimizer) -> None:
    load_optimizer_tensors(model, optimizer, load_file(folder / OPTIM))


def write_state(folder: Path, config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """权重与优化器之外的；facts 是循环自己的计数与数据指纹。

    Raises:
        OSError: 写不下。
    """
    state = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "rng": random_state(),
        "config": config.to_dict(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    (folder / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")


def keep_every_of(folder: Path) -> int:
    """存下这个检查点时的 keep_every：当时说好留着的，后来改小改大都不删。读不出就是 0。"""
    try:
        return int(read_state(folder)["config"].get("keep_every", 0))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return 0


def read_state(folder: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: 没有训练状态（例如导出的模型），或版本不识。
    """
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds a model but no {STATE}: it cannot be resumed")
    try:
        state = json.loads(path.read_bytes())
        version = state["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a training state: {error}") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version={version!r}, this version reads {SCHEMA_VERSION}"
        )
    return state


def load_weights(folder: Path, model: GPT2Model) -> None:
    model.load_state_dict(load_file(folder / "model.safetensors"))

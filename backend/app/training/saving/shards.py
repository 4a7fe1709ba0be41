"""切开的模型与优化器的文件：与一个进程写的逐字节相同，见 app/distributed/storage/files.py。"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from app.distributed.sharding.shard import settle
from app.distributed.storage.files import Table, read_rows
from app.distributed.storage.pieces import part_of
from app.models.transformer import GPT2Model
from app.models.transformer.weights.own_folder import WEIGHTS_FILE
from app.models.transformer.weights.safetensors_file import SafetensorsFiles, header_limit

from .checkpoint import CheckpointError
from .state import OPTIM, optimizer_tensors


def tables(
    model: GPT2Model, optimizer: torch.optim.Optimizer, *, first: bool, copies: bool
) -> dict[str, Table]:
    """{文件名: 表}；first 与 copies 见 pieces.part_of。"""
    settle(model)
    optim = optimizer_tensors(model, optimizer)
    found = {WEIGHTS_FILE: model.state_dict(), OPTIM: optim}
    return {file: _table(tensors, first, copies) for file, tensors in found.items()}


def read_shards(folder: Path, model: GPT2Model, optimizer: torch.optim.Optimizer) -> None:
    """各 rank 只读自己的行：权重与优化器。

    Raises:
        CheckpointError: 有张量对不上模型的参数。
        ValueError: 文件不合这个模型，或短了。
    """
    read_weights(folder, model)
    parameters = dict(model.named_parameters())
    # 每个参数至多几样状态。
    source = SafetensorsFiles([folder / OPTIM], header_limit(8 * len(parameters)))
    wanted: dict[str, Tensor] = {}
    optimizer.state.clear()
    for key, shape in source.shapes.items():
        kind, _, name = key.partition("/")
        if name not in parameters or shape not in (tuple(parameters[name].shape), ()):
            raise CheckpointError(f"{OPTIM}: {key} does not fit the model")
        like = parameters[name].detach()
        scalar = shape == () and like.ndim > 0
        dtype = source.dtype(key)
        value = (
            torch.empty((), dtype=dtype, device=like.device)
            if scalar
            else torch.empty_like(like, dtype=dtype)
        )
        optimizer.state[parameters[name]][kind] = wanted[key] = value
    read_rows(folder / OPTIM, _table(wanted, first=True, copies=True))


def read_weights(folder: Path, model: GPT2Model) -> None:
    """
    Raises:
        ValueError: 文件不合这个模型，或短了。
    """
    settle(model)
    state = model.state_dict()
    read_rows(folder / WEIGHTS_FILE, _table(state, first=True, copies=True))


def _table(tensors: dict[str, Tensor], first: bool, copies: bool) -> Table:
    return {name: part_of(x, first=first, copies=copies) for name, x in tensors.items()}

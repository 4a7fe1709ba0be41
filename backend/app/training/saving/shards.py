"""切开的模型与优化器的文件：与一个进程写的逐字节相同，见 app/distributed/storage/files.py。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from app.distributed.storage.files import read_rows
from app.distributed.storage.pieces import Part
from app.models.transformer import GPT2Model
from app.models.transformer.weights.own_folder import WEIGHTS_FILE
from app.models.transformer.weights.safetensors_file import SafetensorsFiles, header_limit

from .checkpoint import CheckpointError
from .state import OPTIM, optimizer_tensors

# (参数或缓冲区的名字, 手里的一份) -> 它在整个张量的哪里；优化器的状态用所属参数的名字。
Place = Callable[[str, Tensor], Part]


def tables(
    model: GPT2Model, optimizer: torch.optim.Optimizer, place: Place
) -> dict[str, dict[str, Part]]:
    """{文件名: 表}。"""
    optim = optimizer_tensors(model, optimizer)
    found = {WEIGHTS_FILE: model.state_dict(), OPTIM: optim}
    return {file: _table(tensors, place) for file, tensors in found.items()}


def read_shards(
    folder: Path,
    model: GPT2Model,
    optimizer: torch.optim.Optimizer,
    place: Place,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """各 rank 只读自己的行：权重与优化器。shapes：整个模型的参数的形状，别的 rank 有的也在内。

    Raises:
        CheckpointError: 有张量对不上模型的参数。
        ValueError: 文件不合这个模型，或短了。
    """
    read_weights(folder, model, place)
    parameters = dict(model.named_parameters())
    # 每个参数至多几样状态。
    source = SafetensorsFiles([folder / OPTIM], header_limit(8 * len(shapes)))
    wanted: dict[str, Tensor] = {}
    optimizer.state.clear()
    for key, shape in source.shapes.items():
        kind, _, name = key.partition("/")
        if name not in shapes or tuple(shape) not in (shapes[name], ()):
            raise CheckpointError(f"{OPTIM}: {key} does not fit the model")
        if name not in parameters:
            continue
        like = parameters[name].detach()
        scalar = shape == () and like.ndim > 0
        dtype = source.dtype(key)
        value = (
            torch.empty((), dtype=dtype, device=like.device)
            if scalar
            else torch.empty_like(like, dtype=dtype)
        )
        optimizer.state[parameters[name]][kind] = wanted[key] = value
    read_rows(folder / OPTIM, _table(wanted, place))


def read_weights(folder: Path, model: GPT2Model, place: Place) -> None:
    """
    Raises:
        ValueError: 文件不合这个模型，或短了。
    """
    state = model.state_dict()
    read_rows(folder / WEIGHTS_FILE, _table(state, place))


def _table(tensors: Mapping[str, Tensor], place: Place) -> dict[str, Part]:
    return {name: place(name.rpartition("/")[2], x) for name, x in tensors.items()}

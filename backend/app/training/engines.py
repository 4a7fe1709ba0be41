"""按并行的方式挑一个引擎，与它开始时的模型。"""

from __future__ import annotations

from app.distributed.mesh import Mesh
from app.distributed.sharding.start import empty_model
from app.models.transformer import GPT2Model

from .config import TrainConfig
from .engine import AllReduced, Plain, Replicated
from .machine.runtime import Runtime
from .sharded import Sharded
from .split_model import SplitModel


def start_model(config: TrainConfig, runtime: Runtime, mesh: Mesh | None, blank: bool) -> GPT2Model:
    """切片的从 meta 开始（blank 才行：要从别处取权重的先要有地方放）。"""
    if blank and mesh is not None and mesh.shard.size > 1 and not splits_layers(mesh):
        return empty_model(config.model)
    return GPT2Model(config.model).to(runtime.device)


def build_engine(
    model: GPT2Model, config: TrainConfig, runtime: Runtime, mesh: Mesh | None
) -> Plain:
    """mesh 为 None：没有 torchrun 也没有 --ranks，一个进程。"""
    if mesh is None:
        return Plain(model, config, runtime)
    if splits_layers(mesh):
        return SplitModel(model, config, runtime, mesh)
    if mesh.shard.size > 1:
        return Sharded(model, config, runtime, mesh)
    kind = Replicated if config.parallel.exact else AllReduced
    return kind(model, config, runtime, mesh)


def splits_layers(mesh: Mesh) -> bool:
    """副本与分片之外还有别的轴。"""
    return any(n > 1 for axis, n in mesh.sizes.items() if axis not in ("replicate", "shard"))

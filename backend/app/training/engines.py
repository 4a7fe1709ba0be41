"""按并行的方式挑一个引擎，与它开始时的模型。

分片与切开的引擎各要一秒才导入完，所以用到才导入。
"""

from __future__ import annotations

from app.distributed.apply import apply_parallel
from app.distributed.mesh import Mesh
from app.models.transformer import GPT2Model

from .config import TrainConfig
from .engine import AllReduced, Plain, Replicated
from .machine.recompute import checkpoint_blocks
from .machine.runtime import Runtime
from .objectives.objective import Objective
from .step import LM
from .whole_model import WholeModel


def start_model(config: TrainConfig, runtime: Runtime, mesh: Mesh | None, blank: bool) -> GPT2Model:
    """切片的从 meta 开始（blank 才行：要从别处取权重的先要有地方放）。"""
    if blank and mesh is not None and mesh.shard.size > 1 and not mesh.splits_layers:
        from app.distributed.sharding.start import empty_model

        return empty_model(config.model)
    return GPT2Model(config.model).to(runtime.device)


def build_engine(
    model: GPT2Model,
    config: TrainConfig,
    runtime: Runtime,
    mesh: Mesh | None,
    objective: Objective = LM,
) -> Plain:
    """就地把 model 变成这个 rank 的那一份；mesh 为 None：没有 torchrun 与 --ranks，一个进程。"""
    here, blank = mesh or Mesh(), model.device.type == "meta"
    before = None if blank else WholeModel.of(model)
    layers = config.recomputed_layers
    split = apply_parallel(
        model, here, config.parallel, lambda m: checkpoint_blocks(m, layers), runtime.autocast
    )
    if blank:
        from app.distributed.sharding.start import initialize_shards

        initialize_shards(model, config.model, runtime.device)
    whole = before or WholeModel.of(model)
    if mesh is None:
        return Plain(model, config, runtime, here, whole, objective)
    if split is not None:
        from .split_model import SplitModel

        return SplitModel(model, config, runtime, here, whole, objective, split)
    if mesh.shard.size > 1:
        from .sharded import Sharded

        return Sharded(model, config, runtime, here, whole, objective)
    kind = Replicated if config.parallel.exact else AllReduced
    return kind(model, config, runtime, here, whole, objective)

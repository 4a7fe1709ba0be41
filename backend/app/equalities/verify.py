"""在用户的网格上逐项核验，由 rank 0 说；任何一个 rank 不过就是不过。"""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from app.common.tell import Tell
from app.distributed.check import stages_of
from app.distributed.config import ParallelConfig
from app.distributed.mesh import Mesh
from app.models.transformer.config import GPT2Config
from app.training.config import TrainConfig
from app.verification.subject import Subject

from .checks import CHECKS, Found, muon
from .setting import Setting

# 每个读数据的 rank 几个微批，至少一共几个。
_ROUNDS, _LEAVES = 2, 4


def verify_config(model: GPT2Config, parallel: ParallelConfig, data_ranks: int) -> TrainConfig:
    """核验用的训练：模型缩小，一个微批一行；切开之后重现不了的随机（dropout）不要。"""
    batch = max(_LEAVES, _ROUNDS * data_ranks * stages_of(parallel))
    small = Subject.of(model).config
    if any(getattr(parallel, axis) > 1 for axis in ("tensor", "context", "pipeline", "expert")):
        small = small.replace(dropout=0.0)
    return TrainConfig(
        model=small, parallel=parallel, batch_size=batch, micro_batch=1, sample_tokens=0
    )


def verify_ranks(config: TrainConfig, mesh: Mesh, device: torch.device, tell: Tell) -> bool:
    """返回是否全部通过。"""
    setting, failed = Setting(config, mesh, device), 0
    if mesh.world.rank == 0:
        axes = " x ".join(f"{axis} {n}" for axis, n in mesh.sizes.items() if n > 1)
        shape = setting.model
        tell(
            f"{axes} on {device.type}: {shape.n_layer} layers of width {shape.n_embed}, "
            f"vocabulary {shape.vocab_size}, dropout {shape.dropout}"
        )
    checks = [(title, check) for title, check in CHECKS if check is not muon or mesh.tensor.alone]
    for title, check in checks:
        everyone = mesh.world.collect(tuple(_attempt(check, setting)))
        bad = [(rank, said) for rank, (passed, said) in enumerate(everyone) if not passed]
        failed += bool(bad)
        if mesh.world.rank == 0:
            mark, said = ("❌", f"rank {bad[0][0]}: {bad[0][1]}") if bad else ("✅", everyone[0][1])
            tell(f"{mark} {title}: {said}")
    if mesh.world.rank == 0:
        tell(f"{len(checks)} checks, {f'{failed} failed' if failed else 'all passed'}")
    return not failed


def _attempt(check: Callable[[Setting], Found], setting: Setting) -> Found:
    try:
        return check(setting)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Found(False, f"{type(error).__name__}: {error} ({where.name})")

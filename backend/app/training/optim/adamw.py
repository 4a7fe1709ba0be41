"""AdamW：矩阵衰减，增益与偏置不衰减（GPT-3, arXiv:2005.14165 附录 B 的做法）。"""

from __future__ import annotations

import torch

from app.distributed.sharding.adamw import ShardAdamW
from app.distributed.sharding.rows import is_sharded
from app.models.transformer import GPT2Model

from ..config import OptimConfig
from .build import Named, OptimizerKind, Shapes, is_matrix, nbytes, register, trainable


@register("adamw")
class AdamW(OptimizerKind):
    """Loshchilov & Hutter 2019, arXiv:1711.05101。"""

    keeps = "AdamW's two moments"

    def build(self, model: GPT2Model) -> tuple[torch.optim.AdamW, str]:
        return adamw_for(trainable(model), self.config)

    def state_bytes(self, shapes: Shapes) -> int:
        return 2 * nbytes(shapes)


def adamw_for(named: Named, config: OptimConfig) -> tuple[torch.optim.AdamW, str]:
    """管 named 的 AdamW 与一句说明。"""
    devices = {p.device.type for _, p in named}
    fused = devices <= {"cpu", "cuda"}
    if any(is_sharded(p) for _, p in named):
        return _sharded(named, config, fused), "fused AdamW on shards"
    why = "fused AdamW" if fused else f"AdamW, not fused on {', '.join(sorted(devices))}"
    optimizer = torch.optim.AdamW(
        by_decay(named, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )
    return optimizer, why


def _sharded(named: Named, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """
    Raises:
        ValueError: 设备没有融合的内核。
    """
    if not fused:
        devices = sorted({p.device.type for _, p in named})
        raise ValueError(
            f"parallel.shard with device={', '.join(devices)}: shards need the fused AdamW of cpu "
            "or cuda: use device=cpu, device=cuda or parallel.shard=1"
        )
    groups = by_decay(named, config.weight_decay)
    return ShardAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def by_decay(named: Named, weight_decay: float) -> list[dict[str, object]]:
    """两组：矩阵衰减，其余不；空的组不要。"""
    groups = []
    for matrices, decay in ((True, weight_decay), (False, 0.0)):
        mine = [(name, p) for name, p in named if is_matrix(name, p.shape) is matrices]
        if mine:
            names, params = zip(*mine, strict=True)
            groups.append({"params": [*params], "names": [*names], "weight_decay": decay})
    return groups

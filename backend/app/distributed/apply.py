"""各种并行按什么次序加到模型上：整个次序就在下面一屏。

先留下自己的层，再切层里的矩阵与专家，再切词元（这三步在 ways/split.py），然后重算（它包住切好的
块），最后分片：FSDP2 要包住块最终的样子。副本不改模型，只改梯度怎样相加（replicate.py）。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from app.models.transformer import GPT2Model

from .config import ParallelConfig
from .mesh import Mesh

if TYPE_CHECKING:
    from .ways.split import Split
    from .ways.stages import Autocast


def apply_parallel(
    model: GPT2Model,
    mesh: Mesh,
    config: ParallelConfig,
    wrap_blocks: Callable[[GPT2Model], object],
    autocast: Autocast,
) -> Split | None:
    """就地，建优化器之前；返回模型的切法，没有切开就是 None。

    分片与流水线的库各要一秒才导入完，所以用到才导入。

    Args:
        wrap_blocks: 重算各块。
    """
    split = None
    if mesh.splits_layers:
        from .ways.split import Split

        split = Split(model, mesh.inner, config, autocast)
    wrap_blocks(model)
    if mesh.devices is not None and mesh.shard.size > 1:
        from .sharding.shard import shard_model

        exact = config.exact and split is None
        roots = () if split is None else split.roots
        shard_model(model, mesh.devices["shard"], exact, roots)
    return split

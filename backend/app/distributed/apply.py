"""各种并行按什么次序加到模型上：整个次序就在下面一屏。

先切层，再切层里的矩阵与专家，再切词元，然后重算与编译（它们包住切好的块），最后分片：FSDP2 要
包住块最终的样子。副本不改模型，只改梯度怎样相加（replicate.py），所以不在这里。
"""

from __future__ import annotations

from collections.abc import Callable

from app.models.transformer import GPT2Model

from .mesh import Mesh


def apply_parallel(
    model: GPT2Model, mesh: Mesh, wrap_blocks: Callable[[GPT2Model], object]
) -> None:
    """就地，建优化器之前；只有副本时模型不变，只有 wrap_blocks。

    Args:
        wrap_blocks: 重算各块。

    Raises:
        ValueError: 要切开模型的轴。
    """
    used = [f"parallel.{axis}={n}" for axis, n in mesh.sizes.items() if n > 1]
    if mesh.splits_model:
        raise ValueError(
            f"{', '.join(used)}: this version trains replicas only: use parallel.replicate="
            f"{mesh.world.size}"
        )
    wrap_blocks(model)

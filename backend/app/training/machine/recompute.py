"""激活检查点（Chen et al. 2016, arXiv:1604.06174）：只留块的输入，反向时再算一遍块里的。"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from app.models.transformer import GPT2Model


def checkpoint_blocks(model: GPT2Model, layers: Collection[int]) -> None:
    """就地：layers 里的块（从 0 数）重算，其余不。权重名与结果都不变，dropout 也照样重演。

    须在编译各块之前。
    """
    # 按名字而不按次序：流水线上的模型只有自己的几层。
    for name, block in model.h.items():
        block.__dict__.pop("forward", None)
        if int(name) in layers:
            block.forward = _recomputing(block)


def _recomputing(block: nn.Module) -> Any:
    # 取类里的 forward：取实例的会在复制模型时仍指着原来的块。
    plain = type(block).forward

    def forward(x: Tensor, ctx: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(block, x, ctx)
        return checkpoint(plain, block, x, ctx, use_reentrant=False)

    return forward

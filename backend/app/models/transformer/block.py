"""一层 = 两个子层（注意力、前馈），各套一次残差。四种归一化位置只是同一个式子的取值：

    x <- outer(α·x + branch(inner(x)))

| norm     | inner | outer | α          | 来源                                     |
|----------|-------|-------|------------|------------------------------------------|
| post     |       | 有    | 1          | Vaswani et al. 2017；GPT-1               |
| pre      | 有    |       | 1          | GPT-2（模型末尾另有一个归一化）          |
| deepnorm |       | 有    | (2N)^(1/4) | Wang et al. 2022, arXiv:2203.00555       |
| keel     | 有    | 有    | 2N         | arXiv:2601.19895；最初两个子层有例外     |

N 是层数（不是子层数）。B 批、T 词元数、C 宽度。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Attention
from .config import GPT2Config
from .experts.moe import MoE
from .layers.context import Context
from .layers.norm import make_norm
from .mlp import MLP


@dataclass(frozen=True)
class Residual:
    """一个子层的残差：有没有 inner、outer，以及 α。"""

    inner: bool
    outer: bool
    alpha: float = 1.0


def residual_plan(config: GPT2Config, layer: int) -> tuple[Residual, Residual]:
    """第 layer 层（从 0 数）的 (注意力, 前馈) 两个残差。"""
    n = config.n_layer
    if config.norm == "pre":
        return (Residual(True, False),) * 2
    if config.norm == "post":
        return (Residual(False, True),) * 2
    if config.norm == "deepnorm":
        return (Residual(False, True, (2 * n) ** 0.25),) * 2
    if layer == 0:
        # KEEL 第 3 节：首个注意力没有 outer，首层两个子层 α = 1，否则嵌入会被 2N 倍放大。
        return Residual(True, False), Residual(True, True)
    return (Residual(True, True, 2.0 * n),) * 2


def residual(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    inner: nn.Module | None,
    outer: nn.Module | None,
    alpha: float,
) -> Tensor:
    """x <- outer(α·x + branch(inner(x)))。"""
    y = branch(x if inner is None else inner(x))
    y = torch.add(y, x, alpha=alpha)
    return y if outer is None else outer(y)


class Block(nn.Module):
    """ln_1/ln_2 是 GPT-2 的名字：子层唯一的归一化，或 keel 的 inner；*_post 是 keel 的 outer。"""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.plan = residual_plan(config, layer)
        self.attn = Attention(config)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)
        for i, plan in enumerate(self.plan, start=1):
            setattr(self, f"ln_{i}", make_norm(config))
            if plan.inner and plan.outer:
                setattr(self, f"ln_{i}_post", make_norm(config))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)。"""
        x = self._sublayer(1, x, lambda h: self.attn(h, ctx))
        moe = self.mlp if isinstance(self.mlp, MoE) else None
        return self._sublayer(2, x, self.mlp if moe is None else lambda h: moe(h, ctx))

    def _sublayer(self, i: int, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        plan, norm = self.plan[i - 1], getattr(self, f"ln_{i}")
        inner = norm if plan.inner else None
        outer = getattr(self, f"ln_{i}_post", norm) if plan.outer else None
        return residual(x, branch, inner, outer, plan.alpha)

"""可见性：全项目只有这一条规则，以及它落到计算上的三种形式。

B 批、Tq 查询数、Tk 键数。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .pattern import CAUSAL, Causal
from .positions import Positions


def visible(q: Positions, k: Positions, pattern: Causal = CAUSAL) -> Tensor:
    """规则：pattern.allow(q.pos, k.pos) & k 不是填充 & 同一文档。返回 (B|1, Tq, Tk) bool。"""
    q_pos, k_pos = q.pos[:, :, None], k.pos[:, None, :]
    seen = pattern.allow(q_pos, k_pos) & (k_pos >= 0)
    if q.segment is not None and k.segment is not None:
        seen = seen & (q.segment[:, :, None] == k.segment[:, None, :])
    return seen


@dataclass(frozen=True)
class MaskPlan:
    """一次前向里一种图样的掩码，各层共用。

    kind: "causal" 用内核自带的因果标志；"full" 全部可见、不需要掩码；"dense" 用 mask。
    mask: (B|1, 1, Tq, Tk) bool，仅 "dense" 时有。
    """

    kind: Literal["causal", "full", "dense"]
    q: Positions
    k: Positions
    pattern: Causal = CAUSAL
    mask: Tensor | None = None

    @classmethod
    def build(cls, q: Positions, k: Positions, pattern: Causal = CAUSAL) -> MaskPlan:
        """按静态事实选形式；不读张量的值，所以不会打断设备，也不会打断编译。"""
        if q.start is not None and k.start is not None:
            if q.start == k.start and q.length == k.length:
                return cls("causal", q, k, pattern)
            if q.length == 1 and q.start == k.start + k.length - 1:
                return cls("full", q, k, pattern)
        return cls("dense", q, k, pattern, visible(q, k, pattern)[:, None])

    def dense(self) -> Tensor:
        """任何形式的稠密写法，给参考路径：(B|1, 1, Tq, Tk) bool。"""
        return visible(self.q, self.k, self.pattern)[:, None] if self.mask is None else self.mask

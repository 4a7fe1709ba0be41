"""可见性：全项目只有这一条规则。

B 批、Tq 查询数、Tk 键数。
"""

from __future__ import annotations

from torch import Tensor

from .pattern import CAUSAL, Pattern
from .positions import Positions


def visible(q: Positions, k: Positions, pattern: Pattern = CAUSAL) -> Tensor:
    """因果 & pattern.allow & 键不是填充 & 同一文档。返回 (B|1, Tq, Tk) bool。"""
    q_pos, k_pos = q.pos[:, :, None], k.pos[:, None, :]
    seen = (k_pos <= q_pos) & (k_pos >= 0)
    if pattern != CAUSAL:
        seen = seen & pattern.allow(q_pos, k_pos, _marked(q, k))
    if q.segment is not None and k.segment is not None:
        seen = seen & (q.segment[:, :, None] == k.segment[:, None, :])
    return seen


def _marked(q: Positions, k: Positions) -> Tensor | bool:
    """一对里有一个是点名的全局词元（Beltagy et al. 2020, 第 3.1 节：全局是对称的）。"""
    from_q = False if q.marked is None else q.marked[:, :, None]
    return from_q if k.marked is None else k.marked[:, None, :] | from_q

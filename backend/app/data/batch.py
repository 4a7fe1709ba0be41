"""训练一步读到的东西：输入、目标，以及哪个词元属于哪一例。

形状：B 行数，T 上下文长度。
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

# torch 的 cross_entropy 默认略过的目标；各处的损失都认它。
UNSCORED = -100
Rows = slice | np.ndarray
ALL = slice(None)


@dataclass(frozen=True)
class Batch:
    """一批行；None 的那几项这种数据没有。

    Attributes:
        inputs: (B, T) int64。
        targets: (B, T) int64，输入左移一位；UNSCORED 的位置不计分。
        segments: (B, T) int64，行内第几例，不减；补齐的那一段自成一例，从不计分。
        mask: (B, T) bool，补齐的是 False；没有补齐则 None，与从前的训练同一条路。
        positions: (B, T) int64，每例从 0 起。
        reference: (B,) float64，参考模型给这一行的对数概率（偏好训练）。
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None = None
    positions: np.ndarray | None = None
    reference: np.ndarray | None = None
    mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, which: Rows) -> Batch:
        """其中几行；微批与多卡都这样切。"""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: x[which] for k, x in held.items() if x is not None})


def restarting(segments: np.ndarray) -> np.ndarray:
    """每例从 0 起的位置：(B, T)，segments 行内不减。"""
    places = np.arange(segments.shape[1])
    fresh = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return places - np.maximum.accumulate(np.where(fresh, places, 0), axis=1)

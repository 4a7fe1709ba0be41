"""一次前向里各层共用的东西：坐标、掩码计划、缓存的一步。层的签名因此总是 (x, ctx)。"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .cache import Step
from .plan import MaskPlan
from .positions import Positions
from .rope import Rotary


@dataclass(frozen=True)
class Context:
    """plans 每层一个（同一图样的层共用）；rotary 只在 position='rope' 时有。

    maps 收集被点名的层的注意力图 {层: (B, H, Tq, Tk)}；want_maps 是点名的层。
    """

    positions: Positions
    plans: tuple[MaskPlan, ...]
    rotary: Rotary | None = None
    step: Step | None = None
    want_maps: frozenset[int] = frozenset()
    maps: dict[int, Tensor] = field(default_factory=dict)

"""一次前向里各层共用的东西：坐标、掩码计划、缓存的一步。层的签名因此总是 (x, ctx)。"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from .cache import Step
from .plan import MaskPlan
from .positions import Positions
from .rope import Rotary


@dataclass(frozen=True)
class Context:
    """plans 每层一个（同一图样的层共用）；rotary 只在 position='rope' 时有。

    maps 收集被点名的层的注意力图 {层: (B, H, Tq, Tk)}；want_maps 是点名的层。
    layer、plan、want_map 只在 at(layer) 给这一层的里面有意义。层号若存在层里，逐块编译时
    每层都要另编一次，到第八层就不再编译了。
    """

    positions: Positions
    plans: tuple[MaskPlan, ...]
    rotary: Rotary | None = None
    step: Step | None = None
    want_maps: frozenset[int] = frozenset()
    maps: dict[int, Tensor] = field(default_factory=dict)
    layer: int = -1
    want_map: bool = False

    @property
    def plan(self) -> MaskPlan:
        return self.plans[0]

    def at(self, layer: int) -> Context:
        """第 layer 层看到的。"""
        wanted = layer in self.want_maps
        return replace(self, plans=(self.plans[layer],), layer=layer, want_map=wanted)

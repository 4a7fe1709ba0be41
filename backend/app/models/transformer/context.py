"""一次前向里各层共用的东西：坐标、掩码计划、缓存的一步。层的签名因此总是 (x, ctx)。"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .cache import Step
from .plan import MaskPlan
from .positions import Positions
from .rope import Rotary


@dataclass(frozen=True)
class Load:
    """一个 MoE 层这一次的负载，填充不算。

    Attributes:
        load: (E,) int64，挑中每个专家的 (词元, 专家) 对数，丢弃之前。
        dropped: 标量 int64，超出容量而丢掉的对数。
        balance, z: 标量，没有乘系数的均衡损失与 z 损失。
    """

    load: Tensor
    dropped: Tensor
    balance: Tensor
    z: Tensor


@dataclass(frozen=True)
class Context:
    """plans 每层一个（同一图样的层共用）；rotary 只在 position='rope' 时有。

    maps 收集被点名的层的注意力图 {层: (B, H, Tq, Tk)}；want_maps 是点名的层。
    loads 收集各 MoE 层的负载；routing 收集被点名的层的 (专家, 权重)，各 (B, T, k)，专家 E = 没有
    去任何专家。都按层号写：重算激活时同一层写两遍也是同样的值。
    """

    positions: Positions
    plans: tuple[MaskPlan, ...]
    rotary: Rotary | None = None
    step: Step | None = None
    want_maps: frozenset[int] = frozenset()
    maps: dict[int, Tensor] = field(default_factory=dict)
    want_loads: bool = False
    loads: dict[int, Load] = field(default_factory=dict)
    want_routing: frozenset[int] = frozenset()
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

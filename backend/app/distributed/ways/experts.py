"""专家并行（GShard, arXiv:2006.16668）：每个 rank 有 E/W 个专家，词元的行走到专家那里再回来。

一步里：这条轴也是数据的轴，batch 取自己那几行；路由器、稠密的部分与均衡损失都照自己的微批算。
专家的梯度已含各 rank 的词元（反向把行送回去时加的），不再求和，也不除以 W：份额已是全局的；
别的参数在轴上求和。负载（out["expert_load"]）在轴上求和，selection_bias 因此各 rank 相等。
范数：专家相加，其余数一次。检查点：whole 沿专家那一维拼。
R 行数、C 宽度、E 专家数、W rank 数、e = E / W。
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.experts.dispatch import Way as Dispatch
from app.models.transformer.experts.moe import Experts

from ..comm import Ranks
from .layout import Axis
from .moves import trade_rows
from .way import CutWay, check_divides, override, sum_gradients


class SpreadExperts(CutWay):
    axis: ClassVar[Axis] = "expert"
    splits_batch: ClassVar[bool] = True

    def batch(self, x: Any) -> Any:
        check_divides("rows", len(x), "expert", self.ranks)
        n = len(x) // self.ranks.size
        return x[self.ranks.rank * n : (self.ranks.rank + 1) * n]

    def finish_gradients(self) -> None:
        named = self.model.named_parameters()
        sum_gradients([p for name, p in named if self.rules[name] is None], self.ranks)


def spread_experts(model: GPT2Model, ranks: Ranks) -> SpreadExperts:
    """
    Raises:
        ValueError: 没有 MoE 层，专家数不能整除，或点名了逐个专家算的参考做法。
    """
    config = model.config
    if not config.moe_layers:
        raise ValueError(
            f"parallel.expert={ranks.size} but the model has no experts (moe_num_experts=0): "
            "use parallel.expert=1 or a model with MoE layers"
        )
    check_divides("moe_num_experts", config.moe_num_experts, "expert", ranks)
    if config.moe.dispatch == "reference":
        raise ValueError(
            f"moe.dispatch='reference' runs every expert on every token, but parallel.expert="
            f"{ranks.size} holds them on several ranks: use moe.dispatch='auto'"
        )
    way = SpreadExperts(model, ranks)
    for module in model.modules():
        if isinstance(module, Experts):
            override(module, each=partial(_travel, module, ranks))
    return way


def _travel(
    experts: Experts, ranks: Ranks, way: Dispatch, rows: Tensor, ends: Tensor, complete: bool
) -> Tensor:
    """Experts.each 的替身：(R, C) -> (R, C)，行按 E 个专家排好。

    先交换各专家的行数，才知道要收几行。
    """
    mine = ends.diff(prepend=ends.new_zeros(1)).view(ranks.size, -1)  # (W, e)
    came = ranks.exchange(mine)
    send, receive = mine.sum(1).tolist(), came.sum(1).tolist()
    got = trade_rows(rows[: sum(send)], send, receive, ranks)
    # 收来的先按来处、再按专家排；这里只按专家排，同一专家之内仍按来处。
    each = torch.arange(came.shape[1], device=rows.device).repeat(ranks.size)
    order = each.repeat_interleave(came.flatten()).argsort(stable=True)
    y = Experts.each(experts, way, got[order], came.sum(0).cumsum(0), True)
    y = trade_rows(y[order.argsort()], receive, send, ranks)
    return F.pad(y, (0, 0, 0, len(rows) - sum(send)))

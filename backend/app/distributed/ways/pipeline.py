"""流水线并行：层分给 W 个 rank，微批一个接一个地流过；次序由 torch.distributed.pipelining 排。

| schedule    | 每个 rank 的段 | 来源                                             |
|-------------|----------------|--------------------------------------------------|
| gpipe       | 1              | arXiv:1811.06965：先全部前向，再全部反向         |
| 1f1b        | 1              | arXiv:2006.09503：一前一后，激活至多 W 份        |
| interleaved | 2              | arXiv:2104.04473：段更细，气泡减半               |
| zero_bubble | 2              | arXiv:2401.10241：权重的梯度留到气泡里算         |
| zbv         | 2，折返        | 同上                                             |
| dualpipev   | 2，折返        | arXiv:2412.19437 的 DualPipe，折返               |

一步里：各 rank 读同样的批；step 一次做完所有微批的前向与反向，各微批的份额随微批走，
梯度只求和（scale_grads=False）。损失只有最后一段有，step 在轴上求和之后各 rank 相同。
共享的词表若在两个 rank 上各有一份：两份的梯度相加，两份从此逐位相等；范数与检查点只数第一份。
范数：各 rank 的相加。检查点：whole 由主人广播，没有它的 rank 给 None。
次序：keep_stages -> 别的并行 -> FSDP2（层，再是 way.parts 里的段）-> connect。
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from app.models.transformer import GPT2Config, GPT2Model

from ..comm import Ranks
from ..config import Schedule
from ..sharding.rows import local
from .stages import Autocast, Places, Stage, keep_stages, layers_of, rank_of, stages_of
from .way import Count, Way


class Order(NamedTuple):
    """kind：torch 的类；each：每个 rank 几段；folded：折返；splits：把反向拆成两半。"""

    kind: type[Any]
    each: int = 1
    folded: bool = False
    splits: bool = False


ORDERS: dict[Schedule, Order] = {
    "gpipe": Order(ScheduleGPipe),
    "1f1b": Order(Schedule1F1B),
    "interleaved": Order(ScheduleInterleaved1F1B, 2),
    "zero_bubble": Order(ScheduleInterleavedZeroBubble, 2, splits=True),
    "zbv": Order(ScheduleZBVZeroBubble, 2, folded=True, splits=True),
    "dualpipev": Order(ScheduleDualPipeV, 2, folded=True, splits=True),
}


class Flow(NamedTuple):
    """一步的结果，各 rank 相同；aux_loss、load (M, E)、dropped (M,) 没有 MoE 层为 None。"""

    loss: Tensor
    aux_loss: Tensor | None = None
    load: Tensor | None = None
    dropped: Tensor | None = None

    def plus(self, other: Flow) -> Flow:
        both = zip(self, other, strict=True)
        return Flow(*(None if a is None or b is None else a + b for a, b in both))  # type: ignore[arg-type]


class Pipeline(Way):
    """
    Attributes:
        parts: 这个 rank 的段，connect 之后才有：FSDP2 要包的根。
    """

    def __init__(self, model: GPT2Model, ranks: Ranks, schedule: Schedule) -> None:
        super().__init__(model, ranks)
        self.schedule, self.order = schedule, ORDERS[schedule]
        self.stages = ranks.size * self.order.each
        check_pipeline(model.config, ranks.size, schedule)
        self.kept = stages_of(ranks.rank, ranks.size, self.stages, self.order.folded)
        self.last = rank_of(self.stages - 1, ranks.size, self.order.folded)
        keep_stages(model, self.kept, self.stages)
        self.parts: list[Stage] = []
        self._micro = 0

    def build_parts(self, autocast: Autocast = nullcontext) -> list[Stage]:
        """这个 rank 的段；在别的并行都做过之后。"""
        self.parts = [Stage(self.model, s, self.stages, autocast) for s in self.kept]
        return self.parts

    def connect(self, micro_batches: int) -> None:
        """排好微批的次序，个数变了才重排；第一步里各段互告形状，此后微批的形状不可变。

        Raises:
            ValueError: 微批的个数不合这种次序。
        """
        if micro_batches == self._micro:
            return
        check_micro_batches(self.schedule, micro_batches, self.ranks.size)
        device, group = self.model.device, self.ranks.group
        parts = self.parts or self.build_parts()
        stages = [
            PipelineStage(part, s, self.stages, device, group=group)
            for part, s in zip(parts, self.kept, strict=True)
        ]
        self._micro = micro_batches
        self._runner = self.order.kind(
            stages if self.order.each > 1 else stages[0],
            micro_batches,
            loss_fn=lambda loss, _: loss.sum(),
            scale_grads=False,
        )

    def step(
        self, ids: Tensor, targets: Tensor, share: Tensor, places: Places | None = None
    ) -> Flow:
        """整批的前向与反向，梯度加进 .grad。

        share (微批数, 2)：各微批的有效目标占全局的份额；这一段词元的，与整行的（给均衡损失）。
        """
        return self._run(self._runner.step, ids, targets, share, places or {})

    def evaluate(
        self, ids: Tensor, targets: Tensor, share: Tensor, places: Places | None = None
    ) -> Flow:
        """同上，不求梯度；形状须与 step 的相同。"""
        with torch.no_grad():
            return self._run(self._runner.eval, ids, targets, share, places or {})

    def _run(self, run: Any, ids: Tensor, targets: Tensor, share: Tensor, places: Places) -> Flow:
        for part in self.parts:
            part.seen.clear()
        losses: list[Tensor] = []
        run(
            *([ids] if 0 in self.kept else []),
            target=targets,
            losses=losses,
            return_outputs=False,
            ids=ids,
            targets=targets,
            share=share,
            **places,
        )
        wide = torch.promote_types(share.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=ids.device)
        for each in losses:
            loss += each.detach().to(wide)
        return self._with_loads(self.ranks.sum(loss))

    def _with_loads(self, loss: Tensor) -> Flow:
        moe = self.model.config.moe_layers
        if not moe:
            return Flow(loss)
        aux = torch.zeros_like(loss)
        load = torch.zeros(
            len(moe), self.model.config.moe_num_experts, dtype=torch.int64, device=loss.device
        )
        dropped = load.new_zeros(len(moe))
        for part in self.parts:
            rows = [i for i, layer in enumerate(moe) if layer in part.layers]
            # 第一步之前互告形状也走一遍前向，排在前面。
            for one, its_load, its_dropped in part.seen[-self._micro :]:
                aux += one.to(aux.dtype)
                load[rows] += its_load
                dropped[rows] += its_dropped
        return Flow(loss, *(self.ranks.sum(x) for x in (aux, load, dropped)))

    @property
    def has_copy(self) -> bool:
        """共享的词表在两个 rank 上各有一份。"""
        return self.model.config.tie_weights and self.last != 0

    def finish_gradients(self) -> None:
        if not self.has_copy or self.ranks.rank not in (0, self.last):
            return
        weight = self.model.embed.wte.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        mine = local(weight.grad)
        # 两个数之和与次序无关，所以两份从此逐位相等。
        mine += self.ranks.swap(mine, self.last - self.ranks.rank)

    def count(self, name: str) -> Count:
        copy = self.has_copy and name == "embed.wte.weight" and self.ranks.rank == self.last
        return "elsewhere" if copy else "part"

    def owner(self, name: str) -> int:
        """检查点里的 name 由哪个 rank 出。"""
        layer = re.match(r"h\.(\d+)\.", name)
        if layer is None:
            return 0 if name.startswith("embed.") else self.last
        return next(
            rank_of(s, self.ranks.size, self.order.folded)
            for s in range(self.stages)
            if int(layer[1]) in layers_of(s, self.stages, self.model.config.n_layer)
        )

    def whole(self, name: str, mine: Tensor | None) -> Tensor:
        owner = self.owner(name)
        shape, dtype = self.ranks.agree(None if mine is None else (mine.shape, mine.dtype), owner)
        if self.ranks.rank != owner or mine is None:
            mine = torch.empty(shape, dtype=dtype, device=self.model.device)
        return self.ranks.broadcast(mine.contiguous(), owner)


def check_pipeline(config: GPT2Config, ranks: int, schedule: Schedule) -> None:
    """
    Raises:
        ValueError: 层比段少，或这种次序拆开反向而模型有 MoE 层。
    """
    order = ORDERS[schedule]
    if config.n_layer < ranks * order.each:
        raise ValueError(
            f"n_layer={config.n_layer} with parallel.pipeline={ranks} and parallel.schedule="
            f"{schedule!r}, which needs {order.each} stage(s) a rank: use at most "
            f"{config.n_layer // order.each} ranks or schedule='1f1b'"
        )
    if config.moe_layers and order.splits:
        raise ValueError(
            f"moe_num_experts={config.moe_num_experts} with parallel.schedule={schedule!r}: the "
            "balance loss has no path in a backward split in two; use '1f1b' or 'interleaved'"
        )


def check_micro_batches(schedule: Schedule, micro_batches: int, ranks: int) -> None:
    """
    Raises:
        ValueError: 不合这种次序。
    """
    least = {"gpipe": 1}.get(schedule, ranks * ORDERS[schedule].each)
    rounds = max(1, micro_batches // ranks)
    laps = schedule in ("interleaved", "zero_bubble") and micro_batches % rounds
    if micro_batches < least or laps:
        raise ValueError(
            f"{micro_batches} micro-batches with parallel.schedule={schedule!r} and "
            f"parallel.pipeline={ranks}: use a multiple of {ranks}, at least {least}"
        )

"""几条轴一起：模型按固定的次序切开，一步按固定的次序走；训练循环只要这一个对象。

次序由外到里：先留下自己的层，再切层里的矩阵与专家，再切词元；重算、编译、FSDP2 都在这之后、
第一步之前（它们包住切好的块；流水线时 roots 是各段）。
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Model
from app.models.transformer.layers.loss import IGNORE

from ..comm import Ranks
from ..config import ParallelConfig
from .context import split_context
from .experts import spread_experts
from .pipeline import Flow, Pipeline
from .stages import Autocast, Places
from .tensor import split_heads
from .way import Way, gradient_norm


class Split:
    """
    Attributes:
        ways: 由外到里；一个 rank 的轴不在其中。
        roots: FSDP2 的根：整个模型，或流水线在这个 rank 上的各段。

    Args:
        axes: {"pipeline"、"tensor"、"expert"、"context"：那条轴的 Ranks}；没有的就是一个 rank。

    Raises:
        ValueError: 见各种的 split_*、check_pipeline。
    """

    def __init__(
        self,
        model: GPT2Model,
        axes: Mapping[str, Ranks],
        config: ParallelConfig,
        autocast: Autocast = nullcontext,
    ) -> None:
        self.model, self.autocast = model, autocast
        self.ways: list[Way] = []
        used = {name: ranks for name, ranks in axes.items() if not ranks.alone}
        self.pipe: Pipeline | None = None
        self.context: Way | None = None
        if "pipeline" in used:
            self.pipe = Pipeline(model, used["pipeline"], config.schedule)
            self.ways.append(self.pipe)
        if "tensor" in used:
            self.ways.append(split_heads(model, used["tensor"], config.sequence))
        if "expert" in used:
            self.ways.append(spread_experts(model, used["expert"]))
        if "context" in used:
            self.context = split_context(model, used["context"], config.context_way)
            self.ways.append(self.context)
        self.roots: list[nn.Module] = [model]
        if self.pipe is not None:
            self.roots = [*self.pipe.build_parts(autocast)]

    def gradients(
        self, x: Tensor, y: Tensor, micro: int, valid: int, places: Places | None = None
    ) -> Flow:
        """(B, T) 的几行，每次 micro 行 -> 梯度加进 .grad，结果在这几条轴上已求和。

        Args:
            valid: 整批（别的数据轴上的也算）的有效目标数。
            places: 文档号与掩码，各 (B, T)，按 GPT2Model.forward 的名字。
        """
        places = {} if places is None else places
        for way in self.ways:
            x, y = way.batch(x), way.batch(y)
            places = {name: way.batch(each) for name, each in places.items()}
        counts = torch.stack([(part != IGNORE).sum() for part in y.split(micro)])
        share = counts.double() / max(1, valid)
        # 均衡损失是整行的：它的份额也是整行的，不只是这一段。
        rows = share if self.context is None else self.context.ranks.sum(share.clone())
        shares = torch.stack([share, rows], 1)
        if self.pipe is None:
            flow = self._one_by_one(x, y, shares, places)
        else:
            self.pipe.connect(len(shares))
            flow = self.pipe.step(x, y, shares, places)
        for way in self.ways:
            way.finish_gradients()
        return self._summed(flow)

    def norm(self) -> Tensor:
        """全部梯度的范数，float64，各 rank 相同；FSDP2 的要先在它的轴上加。"""
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return gradient_norm(found, self.ways)

    def whole(self, name: str, mine: Tensor | None) -> Tensor | None:
        """完整的张量；集合操作，各 rank 按同样的次序问。"""
        for way in reversed(self.ways):
            mine = way.whole(name, mine)
        return mine

    def part(self, name: str, whole: Tensor) -> Tensor:
        """完整的张量 -> 这个 rank 的份；只问自己有的名字。"""
        for way in self.ways:
            whole = way.part(name, whole)
        return whole

    def _one_by_one(self, x: Tensor, y: Tensor, shares: Tensor, places: Places) -> Flow:
        flow, micro = None, len(x) // len(shares)
        for i, (share, row_share) in enumerate(shares):
            rows = slice(i * micro, (i + 1) * micro)
            mine = {name: each[rows] for name, each in places.items()}
            with self.autocast():
                out = self.model(x[rows], targets=y[rows], **mine)
            loss = out["loss"] * share
            here = Flow(loss.detach().double())
            if "aux_loss" in out:
                aux = out["aux_loss"] * row_share
                here = Flow(
                    here.loss, aux.detach().double(), out["expert_load"], out["expert_dropped"]
                )
                loss = loss + aux
            loss.backward()
            flow = here if flow is None else flow.plus(here)
        assert flow is not None
        return flow

    def _summed(self, flow: Flow) -> Flow:
        for way in self.ways:
            if way.splits_batch:
                flow = Flow(*(None if x is None else way.ranks.sum(x) for x in flow))  # type: ignore[arg-type]
        return flow

"""模型切在几个 rank 上（流水线、张量、专家、上下文）时，引擎里不同的那几处。

切法在 app/distributed/ways。与一个进程差舍入（float64 的梯度 2e-14），不承诺逐位：切开的乘法换了
相加的次序。检查点仍是一个权重一个张量，与一个进程写的互相读得懂。
R 行数、T 词元数。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from app.data.batch import UNSCORED as IGNORE
from app.data.batch import Batch
from app.distributed.comm import Ranks
from app.distributed.mesh import Mesh
from app.distributed.replicate import give_gradients, plain_sum, seed_rows, take_gradients
from app.distributed.sharding.rows import is_sharded, local, rows_of
from app.distributed.sharding.rows import whole as whole_of
from app.distributed.storage.pieces import Box, Part
from app.distributed.ways.layout import Cut, cut_of, spans
from app.distributed.ways.split import Split
from app.distributed.ways.way import Count, Way, gradient_norm
from app.models.transformer import GPT2Model
from app.models.transformer.model import GPT2Output

from .config import TrainConfig
from .machine.runtime import Runtime
from .objectives.objective import Objective, Rows, Scored, forward
from .sharded import Streamed
from .step import Sums
from .watch.gradient_norms import group_of
from .whole_model import WholeModel


class SplitModel(Streamed):
    """mesh 里除副本与分片之外，至少有一条轴不止一个 rank。"""

    why_not_compile = "blocks of a split model talk to other ranks"

    def __init__(
        self,
        model: GPT2Model,
        config: TrainConfig,
        runtime: Runtime,
        mesh: Mesh,
        whole: WholeModel,
        objective: Objective,
        split: Split,
    ) -> None:
        super().__init__(model, config, runtime, mesh, whole, objective)
        self.split = split
        self._ways = list(split.ways)
        if not mesh.shard.alone:
            self._ways.append(_Rows(model, mesh.shard))

    @property
    def summing(self) -> str:
        return "all_reduce"

    @property
    def roots(self) -> list[nn.Module]:
        return self.split.roots

    @property
    def readers(self) -> Ranks:
        """expert 轴上的行由 Split 再分。"""
        return self.mesh.copies

    def gradients(self, batch: Batch, step: int) -> Sums:
        seed_rows(self.config.seed, step, self.mesh.world.rank)
        rows, weight = Rows.on(batch, self.runtime.device), self._weight(batch)
        micro = self.config.rows_at_once
        flow = self.split.gradients(rows.inputs, rows.targets, micro, weight, rows.places)
        aux = torch.zeros_like(flow.loss) if flow.aux_loss is None else flow.aux_loss
        small = [flow.loss, aux]
        if flow.load is not None and flow.dropped is not None:
            small += [flow.load, flow.dropped]
        plain_sum(small, self.readers)
        found = take_gradients(self.parameters)
        plain_sum([local(one) for one in found], self.mesh.replicate)
        give_gradients(self.parameters, found)
        loss, aux, *loads = small
        load, dropped = loads if loads else (None, None)
        return Sums(loss, aux, load, dropped, weight=weight)

    def score(self, model: GPT2Model, rows: Rows, objective: Objective) -> Scored:
        """只有语言模型：别的目标在开始之前就拒绝了（distributed/check.py）。"""
        valid = max(1, int((rows.targets != IGNORE).sum()))
        if (context := self.split.context) is not None:
            given = {name: x for name, x in rows._asdict().items() if x is not None}
            rows = rows._replace(**{name: context.batch(x) for name, x in given.items()})
        if self.split.pipe is None:
            out = forward(model, rows)
            loss = out["loss"] * (int((rows.targets != IGNORE).sum()) / valid)
        else:
            loss = self._through_stages(rows, valid)
        return Scored(self.mesh.context.sum(loss), GPT2Output())

    def _through_stages(self, rows: Rows, valid: int) -> Tensor:
        """流水线的微批形状不可变：不足的行用没有目标的补齐。"""
        x, y, places = rows.inputs, rows.targets, rows.places
        pipe, micro = self.split.pipe, self.config.rows_at_once
        assert pipe is not None
        tokens = self.config.model.context_size // self.mesh.context.size
        if x.shape[1] != tokens:
            raise ValueError(
                f"the validation data gives windows of {x.shape[1]} tokens a rank but "
                f"parallel.pipeline={self.mesh.pipeline.size} needs {tokens}: use more validation "
                "data or a smaller model.context_size"
            )
        count = self.config.passes // self.mesh.data.size
        extra = count * micro - len(x)
        x = torch.cat([x, x[:1].expand(extra, -1)])
        y = torch.cat([y, y.new_full((extra, tokens), IGNORE)])
        places = {name: torch.cat([p, p[:1].expand(extra, -1)]) for name, p in places.items()}
        share = torch.stack([(part != IGNORE).sum() for part in y.split(micro)]).double() / valid
        pipe.connect(count)
        return pipe.evaluate(x, y, torch.stack([share, share], 1), places).loss

    def norm(self) -> Tensor:
        return gradient_norm(self._gradients_here(self.whole.names), self._ways)

    def group_norms(self) -> dict[str, float]:
        groups: dict[str, list[str]] = {}
        for name in self.whole.names:
            groups.setdefault(group_of(name), []).append(name)
        return {
            group: float(gradient_norm(self._gradients_here(names), self._ways))
            for group, names in groups.items()
        }

    def _gradients_here(self, names: Iterable[str]) -> dict[str, Tensor]:
        here = dict(self.model.named_parameters())
        mine = {name: here[name].grad for name in names if name in here}
        return {name: local(grad) for name, grad in mine.items() if grad is not None}

    def whole_parameters(self, pick: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        found, here = {}, dict(self.model.named_parameters())
        for name in self.whole.names:
            mine = pick(here[name]) if name in here else None
            joined = self.split.whole(name, None if mine is None else whole_of(mine.detach()))
            if joined is not None:
                found[name] = joined
        return found

    def tables(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Part]]:
        """别的段的张量也在表里，只是没有块由我拿出。"""
        found = super().tables(optimizer)
        facts = {
            file: {name: (part.shape, part.dtype) for name, part in table.items()}
            for file, table in found.items()
        }
        for others in self.mesh.pipeline.collect(facts):
            for file, table in others.items():
                for name, (shape, dtype) in table.items():
                    nothing = Part(torch.empty(0, dtype=dtype), shape, (), ())
                    found[file].setdefault(name, nothing)
        return found

    def place(self, name: str, mine: Tensor) -> Part:
        boxes = self._boxes(name, mine)
        shape = self.whole.shapes[name] if mine.ndim else ()
        return Part(local(mine.detach()), shape, boxes if self._gives(name, mine) else (), boxes)

    def _boxes(self, name: str, mine: Tensor) -> tuple[Box, ...]:
        rows, rule = rows_of(mine), self._rule(name) if mine.ndim else None
        if not rows.number:
            return ()
        if rule is None:
            return (Box(rows.first, rows.number),)
        ranks: Ranks = getattr(self.mesh, rule.axis)
        found = spans(rule, ranks.rank, ranks.size)
        if rule.dim == 1:
            return tuple(Box(rows.first, rows.number, 0, s.start, s.length, s.at) for s in found)
        cuts = [
            (s, max(s.at, rows.first), min(s.at + s.length, rows.first + rows.number))
            for s in found
        ]
        return tuple(
            Box(s.start + low - s.at, high - low, low - rows.first)
            for s, low, high in cuts
            if low < high
        )

    def _rule(self, name: str) -> Cut | None:
        rule = cut_of(name, self.whole.shapes[name], self.model.config)
        return None if rule is None or getattr(self.mesh, rule.axis).alone else rule

    def _gives(self, name: str, mine: Tensor) -> bool:
        """同样的一份有几个 rank 拿着时，轴上的第一个拿出。"""
        mesh, rule = self.mesh, self._rule(name) if mine.ndim else None
        same = [mesh.replicate, mesh.context]
        same += [] if is_sharded(mine) else [mesh.shard]
        same += [getattr(mesh, a) for a in ("tensor", "expert") if rule is None or rule.axis != a]
        if self.split.pipe is not None and self.split.pipe.owner(name) != mesh.pipeline.rank:
            return False
        return all(ranks.rank == 0 for ranks in same)


class _Rows(Way):
    """FSDP2 的轴：各 rank 的几行相加才是范数。"""

    def count(self, name: str) -> Count:
        return "part"

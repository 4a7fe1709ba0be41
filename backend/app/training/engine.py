"""一步的梯度怎样得来、范数怎样量、权重与优化器怎样存取：训练循环里随并行方式而变的，只有这些。

Plain 是一个进程，如同没有这一层；Replicated 把一批的行分给几个 rank；别的并行方式是别的子类。
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app.adapters.files import Base
from app.data.batch import Batch
from app.distributed.comm import Ranks
from app.distributed.mesh import Mesh
from app.distributed.replicate import (
    TreeSum,
    clip,
    give_gradients,
    leaf_group,
    my_rows,
    plain_sum,
    row_squares,
    seed_rows,
    take_gradients,
    total_norm,
    tree_sum,
)
from app.distributed.sharding.rows import whole as whole_of
from app.models.transformer import GPT2Model

from .config import TrainConfig
from .machine.runtime import Runtime
from .objectives.objective import Objective, Rows, Scored
from .saving.state import load_weights, read_tensors, write_tensors
from .saving.tuned import read_tuned, read_tuned_weights, write_tuned
from .step import (
    LM,
    Sums,
    accumulate,
    backward,
    clip_gradients,
    first_bad_gradient,
    first_bad_weight,
    gradient_norm,
)
from .watch.gradient_norms import gradient_norms
from .whole_model import WholeModel


class Plain:
    """一个进程。

    Attributes:
        summing: 梯度怎样相加，记进检查点："plain"、"tree"、"all_reduce"。
        why_not_compile: 各块不能编译的理由；None = 可以。
        whole: 切开之前的整个模型。
        base: 训练适配器时的原模型；None = 检查点里是整份的权重。
    """

    @property
    def summing(self) -> str:
        return "plain"

    why_not_compile: str | None = None
    base: Base | None = None

    def __init__(
        self,
        model: GPT2Model,
        config: TrainConfig,
        runtime: Runtime,
        mesh: Mesh,
        whole: WholeModel,
        objective: Objective = LM,
    ) -> None:
        self.model, self.config, self.runtime = model, config, runtime
        self.mesh, self.whole, self.objective = mesh, whole, objective
        # 冻结的没有梯度，也就不必相加、不入范数。
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    @property
    def readers(self) -> Ranks:
        """读不同的行的 rank。"""
        return self.mesh.data

    def score(self, model: GPT2Model, rows: Rows, objective: Objective) -> Scored:
        """验证的一个微批，不求梯度。"""
        return objective.score(model, rows)

    @property
    def rows(self) -> slice | np.ndarray:
        """一批里我读哪几行。"""
        return my_rows(self.config.batch_size, self.readers)

    def gradients(self, batch: Batch, step: int) -> Sums:
        """我的几行 -> 整批的梯度，加进 .grad，与整批的几个数。"""
        micro = self.config.rows_at_once
        return accumulate(self.model, batch, micro, self.runtime, self.objective)

    def norm(self) -> Tensor:
        """全部梯度的范数，标量，还在设备上。"""
        return gradient_norm(self.parameters)

    def clip(self, norm: Tensor, size: float) -> None:
        clip_gradients(self.parameters, norm, size, self.config.optim.grad_clip)

    def first_bad_weight(self) -> str | None:
        """第一个含非有限数的权重，哪个 rank 的都算。"""
        return self._first_found(first_bad_weight(self.model))

    def first_bad_place(self) -> str:
        """非有限数最先出现在哪里，给报错用：权重，梯度，或只有损失。"""
        weight = self.first_bad_weight()
        if weight is not None:
            return f"the weight {weight}"
        return self._first_found(first_bad_gradient(self.model)) or "the loss only"

    def group_norms(self) -> dict[str, float]:
        """{层组: 梯度的范数}。"""
        return gradient_norms(self.model.named_parameters())

    def save(self, write: Callable[[], object], optimizer: torch.optim.Optimizer) -> None:
        """rank 0 写，它的错误各 rank 都得到。"""
        self.mesh.world.first(write)

    def write(self, folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, str]:
        """权重与优化器的文件；返回边写边算好了的 {文件: sha256}。"""
        if self.base is None:
            write_tensors(folder, self.model, optimizer)
        else:
            write_tuned(folder, self.model, optimizer, self.config.tune, self.base)
        return {}

    def read(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """各 rank 自己读。"""
        read = read_tensors if self.base is None else read_tuned
        self.mesh.world.together(lambda: read(folder, self.model, optimizer))

    def read_weights(self, folder: Path) -> None:
        """只有权重。"""
        read = load_weights if self.base is None else read_tuned_weights
        read(folder, self.model)

    def whole_parameters(self, pick: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """{名字: pick(参数) 的整个张量}；pick 给 None 的没有。集合操作，给核验用。"""
        picked = {name: pick(p) for name, p in self.model.named_parameters()}
        return {name: whole_of(x.detach()) for name, x in picked.items() if x is not None}

    def _first_found(self, mine: str | None) -> str | None:
        places = self.mesh.world.collect(mine)
        found = next(((r, where) for r, where in enumerate(places) if where is not None), None)
        if found is None:
            return None
        alike = all(where == found[1] for where in places)
        return found[1] if alike else f"{found[1]} of rank {found[0]}"


class Replicated(Plain):
    """几份副本，在固定的树上相加：W = 1、2、4 给出同样的位。"""

    @property
    def summing(self) -> str:
        return "tree"

    def gradients(self, batch: Batch, step: int) -> Sums:
        tree, each = TreeSum(), self._leaves_together() * self.config.rows_at_once
        weight, begin = self._weight(batch), my_rows(self.config.batch_size, self.readers).start
        for first in range(0, len(batch), each):
            rows = slice(first, first + each)
            sums = self._some(batch.rows(rows), weight, step, begin + first)
            tree.add([*take_gradients(self.parameters), *sums.tensors])
        total = tree.total()
        self._add_ranks(total)
        return self._give(total, sums, weight)

    def _weight(self, batch: Batch) -> int:
        """整批数几个；batch 是我的几行。"""
        return int(self.readers.sum(torch.tensor(self.objective.weight(batch)))) or 1

    def _give(self, total: list[Tensor], like: Sums, weight: int) -> Sums:
        """梯度放回 .grad，其余是几个数。"""
        count = len(self.parameters)
        give_gradients(self.parameters, total[:count])
        return like.filled(total[count:], weight)

    def _some(self, batch: Batch, weight: int, step: int, row: int) -> Sums:
        """树的一片：几个微批依次相加，通常就一个。row 是第一行在整批里的号。"""
        micro, total = self.config.rows_at_once, None
        for first in range(0, len(batch), micro):
            rows = slice(first, first + micro)
            seed_rows(self.config.seed, step, row + first)
            part = backward(self.model, batch.rows(rows), weight, self.runtime, self.objective)
            total = part if total is None else total.plus(part)
        assert total is not None
        return total

    def _leaves_together(self) -> int:
        return leaf_group(self.config.passes)

    def _add_ranks(self, total: list[Tensor]) -> None:
        tree_sum(total, self.mesh.data)

    def norm(self) -> Tensor:
        """按行求和：切成行的 rank（FSDP2）也得到同一个数。"""
        return total_norm(row_squares(grad) for grad in self._found())

    def clip(self, norm: Tensor, size: float) -> None:
        clip(self._found(), float(norm), self.config.optim.grad_clip)

    def _found(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


class AllReduced(Replicated):
    """同上，但各 rank 依次相加、再由后端 all_reduce：快，位随 rank 数而变。"""

    @property
    def summing(self) -> str:
        return "all_reduce"

    def _leaves_together(self) -> int:
        return self.config.passes // self.mesh.data.size

    def _add_ranks(self, total: list[Tensor]) -> None:
        plain_sum(total, self.mesh.data)

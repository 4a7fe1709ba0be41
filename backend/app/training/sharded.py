"""权重、梯度与优化器状态切在几个 rank 上（FSDP2）时，引擎里不同的那几处；位与副本的相同。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from app.data.batch import Batch
from app.distributed.replicate import (
    TreeSum,
    plain_sum,
    seed_rows,
    take_gradients,
    total_norm,
    tree_sum,
)
from app.distributed.sharding.norm import gathered_rows
from app.distributed.sharding.rows import local
from app.distributed.sharding.shard import gathers_now, my_groups, settle
from app.distributed.storage.files import Stream
from app.distributed.storage.pieces import Part, part_of
from app.models.transformer.weights.own_folder import CONFIG_FILE

from .engine import Replicated
from .saving.shards import read_shards, read_weights, tables
from .step import Sums, backward
from .watch.gradient_norms import norms_of_rows


class Streamed(Replicated):
    """没有哪个 rank 放下整个模型：检查点流过 rank 0，读时各取所需。"""

    _stream: Stream | None = None

    @property
    def roots(self) -> list[nn.Module]:
        """FSDP2 的各组的根；只前向（验证）之后它们还是聚齐的，见 settle。"""
        return [self.model]

    def place(self, name: str, mine: Tensor) -> Part:
        """手里的 name 在整个张量的哪里。"""
        first, copies = self.mesh.world.rank == 0, self.mesh.replicate.rank == 0
        return part_of(mine, first=first, copies=copies)

    def tables(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Part]]:
        """{文件: {张量名: 我的那一份}}，各 rank 同样的名字。"""
        settle(self.roots)
        return tables(self.model, optimizer, self.place)

    def first_bad_weight(self) -> str | None:
        settle(self.roots)
        return super().first_bad_weight()

    def save(self, write: Callable[[], object], optimizer: torch.optim.Optimizer) -> None:
        """各 rank 的行流过 rank 0；它写不下去时，各 rank 得到同样的错误。"""
        self._stream = stream = Stream(self.tables(optimizer), self.mesh.world)

        def write_and_close() -> None:
            try:
                write()
            finally:
                stream.close()

        self.mesh.world.first(write_and_close, stream.serve)

    def write(self, folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, str]:
        stream = self._stream
        assert stream is not None
        (folder / CONFIG_FILE).write_text(self.model.config.to_json(), encoding="utf-8")
        return {file: stream.write(file, folder / file) for file in stream.files}

    def read(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        settle(self.roots)
        self.mesh.world.together(
            lambda: read_shards(folder, self.model, optimizer, self.place, self.whole.shapes)
        )

    def read_weights(self, folder: Path) -> None:
        settle(self.roots)
        self.mesh.world.together(lambda: read_weights(folder, self.model, self.place))

    def _found(self) -> list[Tensor]:
        return [local(grad) for grad in super()._found()]


class Sharded(Streamed):
    """每份副本切在 mesh.shard 上；副本之间每步加一次（HSDP）。"""

    @property
    def summing(self) -> str:
        return "tree" if self.config.parallel.exact else "all_reduce"

    @property
    def rows(self) -> np.ndarray:
        micro = self.config.rows_at_once
        return np.array(
            [row + i for group in self._groups() for row in group for i in range(micro)]
        )

    def _groups(self) -> list[list[int]]:
        """我的各轮：一轮是几个微批，各从整批的第几行起。"""
        copies, micro = self.mesh.replicate, self.config.rows_at_once
        each = self.config.passes // copies.size
        if self.config.parallel.exact:
            groups = my_groups(each, self.mesh.shard)
        else:
            mine = each // self.mesh.shard.size
            groups = [range(self.mesh.shard.rank * mine, (self.mesh.shard.rank + 1) * mine)]
        return [[(copies.rank * each + leaf) * micro for leaf in group] for group in groups]

    def gradients(self, batch: Batch, step: int) -> Sums:
        tree, weight, at = TreeSum(), self._weight(batch), 0
        add = tree_sum if self.config.parallel.exact else plain_sum
        for group in self._groups():
            end = at + len(group) * self.config.rows_at_once
            sums = self._round(batch.rows(slice(at, end)), weight, step, group)
            small = sums.tensors
            add(small, self.mesh.shard)
            tree.add([*take_gradients(self.parameters), *small])
            at = end
        total = tree.total()
        add([local(one) for one in total], self.mesh.replicate)
        return self._give(total, sums, weight)

    def _round(self, batch: Batch, weight: int, step: int, group: list[int]) -> Sums:
        """一轮的几个微批，最后一个之后才归约；不求位时每个都归约，省下整份的梯度。"""
        micro, total = self.config.rows_at_once, None
        for i, row in enumerate(group):
            mine = slice(i * micro, (i + 1) * micro)
            gathers_now(self.model, row == group[-1] or not self.config.parallel.exact)
            seed_rows(self.config.seed, step, row)
            part = backward(self.model, batch.rows(mine), weight, self.runtime, self.objective)
            total = part if total is None else total.plus(part)
        assert total is not None
        return total

    def norm(self) -> Tensor:
        return total_norm(self._rows_of_gradients().values())

    def group_norms(self) -> dict[str, float]:
        return norms_of_rows(self._rows_of_gradients())

    def _rows_of_gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        found = {name: p.grad for name, p in named if p.grad is not None}
        return gathered_rows(found, self.mesh.shard)

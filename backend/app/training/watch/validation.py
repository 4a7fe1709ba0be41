"""验证损失：固定的行，所以每次可比；不动训练的随机数。

R 一次前向的行数，K 另外记下的数的个数。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from app.data.batch import Batch
from app.data.feed import Feed
from app.data.shards import TokenDataset
from app.distributed.comm import ALONE, Ranks
from app.models.transformer import GPT2Model

from ..machine.runtime import Runtime
from ..objectives.language_model import LanguageModel
from ..objectives.objective import Objective, Rows, Scored

LM = LanguageModel()
Score = Callable[[GPT2Model, Rows, Objective], Scored]


class Held(Protocol):
    """固定的几组行。

    Attributes:
        groups: 几组。
        measured: 在什么上量的：两次的这一项相同，损失才可以比。
    """

    groups: int
    measured: dict[str, Any]

    def batch(self, group: int) -> Batch: ...


class Spread:
    """文本里均匀铺开的窗口，互不重叠。

    Args:
        windows: 至多用几个窗口；0 = 全部。
        rows: 一次前向几个窗口。
    """

    def __init__(self, data: TokenDataset, context: int, windows: int, rows: int) -> None:
        if data.n_tokens < 2:
            raise ValueError(
                f"the validation data has {data.n_tokens} tokens, at least 2 are needed: "
                "prepare it again with a larger validation part"
            )
        self._data, self._rows = data, rows
        # 验证集比一个上下文还短时，就用它全部作一个短窗口。
        self._length = min(context, data.n_tokens - 1)
        possible = (data.n_tokens - 1) // self._length
        count = min(windows, possible) if windows else possible
        self._starts = np.arange(count) * possible // count * self._length
        self.groups = -(-count // rows)
        self.measured = {"data": data.fingerprint, "windows": count, "context": self._length}

    def batch(self, group: int) -> Batch:
        starts = self._starts[group * self._rows : (group + 1) * self._rows]
        rows = np.stack([self._data.read(int(start), self._length + 1) for start in starts])
        return Batch(rows[:, :-1], rows[:, 1:])


class Taken:
    """对话、偏好、分开的文档：一轮里的前几批；一轮的次序是打乱的，所以也铺得开。

    Args:
        windows: 至多用几行；0 = 全部。
        how: 损失是哪一种：哪些词元计分，DPO 的 β 与参考。
    """

    def __init__(
        self, feed: Feed, data: TokenDataset, windows: int, how: Mapping[str, Any]
    ) -> None:
        self._feed = feed
        every, rest = divmod(feed.rows_in_epoch, feed.batch_size)
        # 不满的末一批若以不计分的行补足就要；窗口则会接着读下一轮的，不要。
        if not every or (rest and feed.windows(every + 1) == feed.rows_in_epoch):
            every += 1
        self.groups = min(every, -(-windows // feed.batch_size)) if windows else every
        rows = min(self.groups * feed.batch_size, feed.rows_in_epoch)
        self.measured = {
            "data": data.fingerprint, "windows": rows, "context": feed.context, **how,
        }  # fmt: skip

    def batch(self, group: int) -> Batch:
        return self._feed.batch(group)


class Validation:
    """一个验证集。

    Args:
        objective: 量什么；总是交叉熵，偏好数据是 DPO。从不是蒸馏的 KL：混进去就与别的训练不可比。
        ranks: 各组行轮流分给它们；相加的次序不变，所以几个 rank 都是同一个数。
        score: 一个微批的前向；切开的模型有自己的走法。

    Attributes:
        numbers: 上一次另外量得的，名字见 Objective.names。
    """

    def __init__(
        self,
        held: Held,
        objective: Objective = LM,
        ranks: Ranks = ALONE,
        score: Score = lambda model, rows, objective: objective.score(model, rows),
        name: str = "val",
    ) -> None:
        self._held, self._objective, self._ranks, self._score = held, objective, ranks, score
        self.name = name
        self.numbers: dict[str, float] = {}

    @property
    def measured(self) -> dict[str, Any]:
        return self._held.measured

    def loss(
        self, model: GPT2Model, runtime: Runtime, stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """每词元的平均交叉熵（nat；偏好数据：每对的 DPO 损失）；中途要求停止则 None。"""
        groups, sums, was_training = self._held.groups, [], model.training
        model.eval()
        with torch.no_grad(), runtime.autocast():
            for first in range(0, groups, self._ranks.size):
                if stop():
                    break
                # 没有轮到的也算一组（不计）：切开的模型要大家一起前向。
                mine = min(first + self._ranks.rank, groups - 1)
                sums.append(self._sums(model, runtime, self._held.batch(mine)))
        model.train(was_training)
        if len(sums) * self._ranks.size < groups:
            return None
        # 各组的留在设备上，到这里才等它一次。
        all_ranks = self._ranks.gather(torch.stack(sums).cpu())
        found = all_ranks.transpose(0, 1).flatten(0, 1)[:groups]
        weight, loss, *numbers = (sum(column) for column in found.T.tolist())
        weight = weight or 1.0
        names = self._objective.names
        self.numbers = {n: x / weight for n, x in zip(names, numbers, strict=True)}
        return loss / weight

    def _sums(self, model: GPT2Model, runtime: Runtime, batch: Batch) -> Tensor:
        """(2 + K,) float64：份额，损失之和，各数之和。"""
        found = self._score(model, Rows.on(batch, runtime.device), self._objective)
        # 整个的窗口按行数：与按词元数只差舍入，而从前的训练就是这样量的。
        whole = batch.segments is None
        weight = len(batch) if whole else self._objective.weight(batch)
        values = [found.loss[None]] if found.numbers is None else [found.loss[None], found.numbers]
        means = torch.cat([value.double() for value in values])
        return torch.cat([means.new_full((1,), weight), means * weight])

"""分片训练的一步占多少内存、搬多少字节：真的几个 rank 与假的进程组走的是同一段代码。

假的没有数，也不通信，只有形状，所以一个进程就能说出一千个 rank 里的一个要多少；测试拿真的 2、4 个
rank 的对照，字节数相同（tests/distributed/test_plan.py）。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from app.distributed.comm import Ranks
from app.distributed.replicate import (
    TreeSum,
    give_gradients,
    plain_sum,
    take_gradients,
    total_norm,
    tree_sum,
)
from app.distributed.sharding.norm import gathered_rows
from app.distributed.sharding.rows import local
from app.distributed.sharding.shard import gathers_now
from app.models.transformer import GPT2Model

# torch 的操作 -> (给人读的名字, 第几个参数是要搬的)。
_OPS = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
Rounds = list[list[tuple[Tensor, Tensor]]]


@dataclass
class Calls:
    """各种通信的次数与字节数；字节按整个缓冲算，自己的那一份也在内。"""

    count: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)

    def plus(self, other: Calls, times: float = 1) -> Calls:
        """self + times * other，逐项。"""

        def line(a: Counter[str], b: Counter[str]) -> Counter[str]:
            return Counter({key: round(a[key] + times * b[key]) for key in a | b})

        return Calls(line(self.count, other.count), line(self.nbytes, other.nbytes))


@dataclass(frozen=True)
class Step:
    """一个 rank 的一步。

    Attributes:
        peak: {类别: 字节}，最多的那一刻；Total 是总数。
        calls: 这一步的通信；round 是其中第一轮的，各轮都一样。
    """

    peak: dict[str, int]
    calls: Calls
    round: Calls


class _Count(TorchDispatchMode):
    """数通信的次数与字节。"""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            found = _OPS.get(func._schema.name.partition("::")[2])
            if found is not None:
                name, place = found
                self.calls.count[name] += 1
                self.calls.nbytes[name] += _nbytes(args[place])
        return func(*args, **(kwargs or {}))


def _nbytes(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    return sum(map(_nbytes, x))


@dataclass(frozen=True)
class Way:
    """
    Attributes:
        ranks, copies: 分片的那些 rank，与持有同一份分片的那些。
    """

    ranks: Ranks
    copies: Ranks
    exact: bool


def tracked_step(
    model: GPT2Model, optimizer: torch.optim.Optimizer, rounds: Rounds, way: Way
) -> Step:
    """第二步（优化器的状态已有）的峰值与通信；rounds 是我的各轮，一轮几个微批。"""
    # 第一步只为造出优化器的状态，一轮就够。
    take_step(model, optimizer, rounds[:1], way, lambda: None)
    tracker, counter = FSDPMemTracker(model, optimizer), _Count()
    tracker.track_inputs((rounds,))
    before: list[Calls] = []

    def forward_begins() -> None:
        before.append(counter.calls.plus(Calls()))
        # 追踪器不许一个模块前向两次，除非先清它按模块记的账；峰值留着。
        tracker.reset_mod_stats()

    with counter, tracker:
        take_step(model, optimizer, rounds, way, forward_begins)
    first = Calls()
    if len(rounds) > 1:
        first = before[len(rounds[0])].plus(before[0], -1)
    (found,) = tracker.get_tracker_snapshot("peak").values()
    peak = {str(getattr(kind, "value", kind)): size for kind, size in found.items()}
    return Step(peak, counter.calls, first)


def take_step(
    model: GPT2Model,
    optimizer: torch.optim.Optimizer,
    rounds: Rounds,
    way: Way,
    before: Callable[[], object],
) -> None:
    tree, parameters = TreeSum(), list(model.parameters())
    for group in rounds:
        for last, (x, y) in enumerate(group, 1 - len(group)):
            gathers_now(model, last == 0 or not way.exact)
            before()
            (model(x, targets=y)["loss"] * 0.5).backward()
        if way.exact:
            tree.add(take_gradients(parameters))
    if way.exact:
        give_gradients(parameters, tree.total())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (tree_sum if way.exact else plain_sum)([local(g) for g in gradients.values()], way.copies)
    total_norm(gathered_rows(gradients, way.ranks).values())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

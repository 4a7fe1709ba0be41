"""几个 rank 一起训练，一个 rank 要多少内存、一步搬多少字节：在租机器之前就知道，也不需要它们。

假的进程组（torch 的 FakeStore）加没有数的张量，走真的分片与真的一步。层数多时只走两种层数的，其余
按每层外推：内存与字节都随层数线性地长。
R 副本数，S 分片数。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from app.distributed.comm import Ranks
from app.distributed.replicate import leaf_group
from app.distributed.sharding.shard import check_tree, shard_model
from app.models.transformer import GPT2Model
from app.training.config import TrainConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.optim.build import build_optimizer
from app.training.ranks import with_leaves

from .probe import few_layers, probe_layers
from .tracked import Calls, Step, Way, tracked_step

# 假的一步按层数外推时至少走几层：FSDP2 会预取一块，太少看不到峰值。
_LEAST_LAYERS = 3


@dataclass(frozen=True)
class RanksPlan:
    """
    Attributes:
        replicate, shard: R 与 S。
        micro_batch: 一次几行；没有写明时与训练选的相同。
        rounds: 一个 rank 一步做几个微批。
        peak: {类别: 字节}，一个 rank 的峰值；held 是各轮之间留着的梯度，另算。
        layers: 实际走了几层；0 = 全部。
        wire: 一个 rank 一步送出的字节数，自己留下的不算。
    """

    replicate: int
    shard: int
    micro_batch: int
    rounds: int
    peak: dict[str, int]
    held: int
    calls: Calls
    wire: int
    layers: int

    def seconds(self, gigabytes: float) -> float:
        """全部通信一个接一个时要的秒数；与计算重叠的话更少。"""
        return self.wire / (gigabytes * 1e9)


def plan_ranks(config: TrainConfig, world: int) -> RanksPlan:
    """
    Args:
        world: rank 的总数。

    Raises:
        ValueError: 分不匀，或这种并行还不能这样规划。
    """
    replicate, shard = _degrees(config, world)
    config = with_leaves(config, world)
    _check_batch(config, world)
    leaves = config.batch_size // config.rows_at_once
    group = leaf_group(leaves) if config.parallel.exact else 1
    rounds = leaves // (world * group)
    with fake_world(replicate, shard) as mesh, FakeTensorMode():
        found = [walk(config, layers, mesh, group, min(2, rounds)) for layers in _layers(config)]
    step = _line(found, _layers(config), config.model.n_layer)
    calls = step.calls.plus(step.round, rounds - min(2, rounds))
    held = 0
    if config.parallel.exact and rounds > 2:
        held = (rounds.bit_length() - 2) * step.peak["Sharded Param"]
    layers = _layers(config)[-1]
    return RanksPlan(
        replicate=replicate,
        shard=shard,
        micro_batch=config.rows_at_once,
        rounds=rounds * group,
        peak=step.peak,
        held=held,
        calls=calls,
        wire=_wire(calls, shard),
        layers=0 if layers == config.model.n_layer else layers,
    )


def _degrees(config: TrainConfig, world: int) -> tuple[int, int]:
    """(R, S)。"""
    parallel, shard = config.parallel, config.parallel.shard
    for axis in ("tensor", "context", "expert", "pipeline"):
        if getattr(parallel, axis) > 1:
            raise ValueError(
                f"parallel.{axis}={getattr(parallel, axis)} is not planned without machines yet: "
                f"plan with parallel.{axis}=1, or run a few steps on the real ones"
            )
    if config.model.moe_layers:
        raise ValueError(
            f"model.moe_num_experts={config.model.moe_num_experts}: the experts' memory depends on "
            "the tokens and cannot be planned without them: plan the model without experts"
        )
    replicate = parallel.replicate or world // shard
    if replicate * shard != world:
        raise ValueError(
            f"ranks={world} but parallel.replicate={replicate} x parallel.shard={shard} is "
            f"{replicate * shard}: use --ranks {max(1, replicate) * shard} or other degrees"
        )
    if parallel.exact:
        check_tree(world, "ranks")
    return replicate, shard


def _check_batch(config: TrainConfig, world: int) -> None:
    at_once = world * config.rows_at_once
    each, rest = divmod(config.batch_size, at_once)
    if rest or not each:
        raise ValueError(
            f"batch_size={config.batch_size} is no multiple of {world} ranks x "
            f"{config.rows_at_once} sequences at once: use --batch-size {at_once * max(1, each)}"
        )


def _layers(config: TrainConfig) -> tuple[int, ...]:
    """走几层的模型：不多就走全部。"""
    cycle = probe_layers(config)[0]
    few = cycle * -(-_LEAST_LAYERS // cycle)
    return (few, few + cycle) if few + cycle < config.model.n_layer else (config.model.n_layer,)


@contextmanager
def fake_world(replicate: int, shard: int) -> Iterator[DeviceMesh]:
    """假的进程组里的网格；网格须在假张量之外造。"""
    if dist.is_initialized():
        raise ValueError("`gpt2 plan` stands for all ranks: run it once, without torchrun")
    dist.init_process_group("fake", rank=0, world_size=replicate * shard, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()


def walk(config: TrainConfig, layers: int, mesh: DeviceMesh, group: int, rounds: int) -> Step:
    """造一个 layers 层的模型，切开，走两步；真的与假的进程组都行。"""
    copies, ranks = (Ranks.of(mesh.get_group(axis)) for axis in ("replicate", "shard"))
    model = GPT2Model(few_layers(config.model, layers)).train()
    checkpoint_blocks(model, [i for i in config.recomputed_layers if i < layers])
    shard_model(model, mesh["shard"], config.parallel.exact)
    optimizer, _ = build_optimizer(model, config.optim)
    shape = (config.rows_at_once, config.model.context_size)
    x = torch.zeros(shape, dtype=torch.int64)
    batches = [[(x, x)] * group] * rounds
    return tracked_step(model, optimizer, batches, Way(ranks, copies, config.parallel.exact))


def _line(found: Sequence[Step], layers: Sequence[int], wanted: int) -> Step:
    """过两种层数的直线在 wanted 处。"""
    if len(found) == 1:
        return found[0]
    (a, b), times = found, (wanted - layers[1]) / (layers[1] - layers[0])
    peak = {
        kind: round(b.peak[kind] + times * (b.peak[kind] - a.peak.get(kind, 0))) for kind in b.peak
    }
    calls, one = (y.plus(y.plus(x, -1), times) for x, y in ((a.calls, b.calls), (a.round, b.round)))
    return Step(peak, calls, one)


def _wire(calls: Calls, shard: int) -> int:
    """一个 rank 真正送出的：聚齐、归约、互换都有自己的 1/S 不必送；副本之间的蝶形全送。"""
    cut = sum(calls.nbytes[name] for name in ("all_gather", "reduce_scatter", "all_to_all"))
    return round(cut * (shard - 1) / shard) + calls.nbytes["send"] + 2 * calls.nbytes["all_reduce"]

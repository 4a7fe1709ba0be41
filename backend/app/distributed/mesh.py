"""网格：rank 排成几个轴，每个轴一个 Ranks；度数之积等于 rank 的个数。

从外到里：pipeline、replicate、shard、expert、context、tensor：通信最多的在最里面，落在同一台机器上。
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .comm import Ranks
from .config import ParallelConfig

AXES = ("pipeline", "replicate", "shard", "expert", "context", "tensor")
# 读不同的行的轴；其余各轴的 rank 读同样的行。
DATA = ("replicate", "shard", "expert")


@dataclass(frozen=True)
class Mesh:
    """
    Attributes:
        world: 所有的 rank。
        data: 读不同的行的 rank，replicate、shard、expert 三轴排成一行。
        copies: 持有同样的专家的 rank（replicate、shard 两轴），专家的梯度在它们之间相加。
        devices: torch 的网格，给 FSDP2；只有一个 rank 时没有。
    """

    world: Ranks = Ranks()
    pipeline: Ranks = Ranks()
    replicate: Ranks = Ranks()
    shard: Ranks = Ranks()
    expert: Ranks = Ranks()
    context: Ranks = Ranks()
    tensor: Ranks = Ranks()
    data: Ranks = Ranks()
    copies: Ranks = Ranks()
    devices: DeviceMesh | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis).size for axis in AXES}

    @property
    def inner(self) -> dict[str, Ranks]:
        """切开一层或一行的轴：副本与分片之外的。"""
        return {axis: getattr(self, axis) for axis in AXES if axis not in ("replicate", "shard")}

    @property
    def splits_layers(self) -> bool:
        return any(not ranks.alone for ranks in self.inner.values())


def degrees(config: ParallelConfig, world: int) -> dict[str, int]:
    """各轴的度数，由外到里；replicate=0 是剩下的全部。

    Raises:
        ValueError: 度数之积不是 rank 的个数。
    """
    found = {axis: getattr(config, axis) for axis in AXES}
    others = math.prod(size for axis, size in found.items() if axis != "replicate")
    said = " x ".join(f"{axis} {size}" for axis, size in found.items() if size > 1) or "1"
    if config.replicate == 0:
        if world % others:
            raise ValueError(
                f"{world} ranks cannot be divided into {said} = {others}: start a multiple of "
                f"{others} ranks or change the degrees under parallel"
            )
        found["replicate"] = world // others
    elif others * config.replicate != world:
        raise ValueError(
            f"{world} ranks were started but {said} = {others * config.replicate}: start "
            f"{others * config.replicate} ranks, or parallel.replicate=0 for all ranks left"
        )
    return found


def build_mesh(config: ParallelConfig, device: str) -> Mesh:
    """进程组已经建好之后；device 是 "cpu" 或 "cuda"。"""
    world = Ranks.world()
    if world.alone:
        return Mesh()
    found = degrees(config, world.size)
    devices = init_device_mesh(device, tuple(found.values()), mesh_dim_names=AXES)
    axes = {axis: Ranks.of(devices.get_group(axis)) for axis in AXES}
    data, copies = (devices[names]._flatten("_".join(names)) for names in (DATA, DATA[:2]))
    return Mesh(
        world=world,
        data=Ranks.of(data.get_group()),
        copies=Ranks.of(copies.get_group()),
        devices=devices,
        **axes,
    )

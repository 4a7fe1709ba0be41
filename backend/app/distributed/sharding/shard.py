"""分片：权重、梯度、优化器状态各 rank 只留几行，用到一块时才聚齐那一块（FSDP2，ZeRO-3）。

位与一个进程的固定树相同（docs/decisions/021）：第 i 个微批是树的第 i 片叶，rank r 做第 r、r+W、…
组，所以每一轮里各 rank 的和正是树的下面几层（TreeScatter），各轮之间是上面几层（TreeSum）。
W 一组里的 rank 数。
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from app.models.transformer import GPT2Model

from ..comm import Ranks
from ..replicate import leaf_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_model(
    model: GPT2Model, mesh: DeviceMesh, exact: bool, roots: Sequence[nn.Module] = ()
) -> None:
    """就地：每块一组，其余（词嵌入、位置、末尾的归一化、输出头）都在根的那一组。

    词嵌入须在根里：共享的输出头在所有的块之后还要读它。须在 checkpoint_blocks 与编译之后。

    Args:
        mesh: 一维，分片的那些 rank；几份副本之间的和由调用者另加（HSDP）。
        exact: 按固定的树相加；False = 后端的 reduce-scatter，次序由它定。
        roots: 块之外的各组；默认是整个模型，流水线时是各段。

    Raises:
        ValueError: mesh 不是一维，或 exact 而 rank 数不是 2 的幂。
    """
    if mesh.ndim != 1:
        raise ValueError(f"the shard mesh has {mesh.ndim} dimensions, expected 1: mesh['shard']")
    if exact:
        check_tree(mesh.size())
    for module in (*model.h.values(), *(roots or (model,))):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        # 损失的份额已按全批的词元算，所以只求和；gloo 没有 PREMUL_SUM，SUM 才处处都有。
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if exact:
            module.set_custom_reduce_scatter(TreeScatter())


def check_tree(size: int, what: str = "parallel.shard") -> None:
    """
    Raises:
        ValueError: 不是 2 的幂。
    """
    if size & (size - 1):
        raise ValueError(
            f"{what}={size} with parallel.exact=true: the fixed tree needs a power of two "
            f"of ranks: use {1 << (size.bit_length() - 1)} ranks or parallel.exact=false"
        )


class TreeScatter(ReduceScatter):
    """各 rank 的第 j 份都送到 rank j，在那里按固定的树相加；搬的字节数与环形的一样。"""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        ranks = Ranks.of(group)
        parts = ranks.exchange(input_tensor.view(ranks.size, -1))
        while len(parts) > 1:
            parts = parts[0::2].add_(parts[1::2])
        output_tensor.copy_(parts[0])


def my_groups(leaves: int, ranks: Ranks) -> list[range]:
    """我做哪几片叶子：树的每一组（leaf_group 片连着的）轮流分给各 rank，一轮一组。

    组里不止一片时，先在不切开的梯度里依次相加（set_requires_gradient_sync），再归约。
    """
    size = leaf_group(leaves)
    return [range(g * size, (g + 1) * size) for g in range(ranks.rank, leaves // size, ranks.size)]


def gathers_now(model: GPT2Model, now: bool) -> None:
    """下一次反向之后是归约到各 rank，还是先留着整份的梯度。"""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(now)


def settle(roots: Iterable[nn.Module]) -> None:
    """聚齐着的权重放回各自的几行：只前向（验证）之后，根的那一组还是聚齐的。

    那时 named_parameters 给出的不是优化器认得的参数，按名字找状态会悄悄漏掉词嵌入的。
    """
    for root in roots:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

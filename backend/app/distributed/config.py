"""并行的设置：冻结的数据类，不依赖 torch。各轴的度数之积就是 rank 的个数。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from app.models.transformer.settings.fields import Mark, normalise_types

ContextWay = Literal["auto", "halo", "ulysses", "gather", "ring"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """一次训练怎样分到多个 rank 上；没有 torchrun 或 --ranks 时全是默认。"""

    replicate: Annotated[
        int,
        Doc("copies of the model, each reading its part of the batch; 0 = all ranks left"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = 0
    shard: Annotated[
        int,
        Doc("ranks that share one copy of weights, gradients and optimizer state (FSDP2)"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = 1
    tensor: Annotated[int, Doc("ranks that split heads, hidden width and vocabulary")] = 1
    sequence: Annotated[
        bool, Doc("between the split matrices also split the tokens over the tensor ranks")
    ] = False
    context: Annotated[int, Doc("ranks that split the tokens of one sequence")] = 1
    context_way: Annotated[
        ContextWay,
        Doc("how keys reach other ranks; auto = halo for bounded patterns, else ulysses or gather"),
    ] = "auto"
    expert: Annotated[int, Doc("ranks that split the experts of each MoE layer")] = 1
    pipeline: Annotated[int, Doc("ranks that split the layers")] = 1
    schedule: Annotated[Schedule, Doc("order of micro-batches in the pipeline")] = "1f1b"
    exact: Annotated[
        bool, Doc("sum in one fixed tree: the same bits for 1, 2, 4 ranks; false = all_reduce")
    ] = True
    timeout_s: Annotated[
        float, Doc("seconds that a rank waits for the others"), Mark.SILENT, Mark.ASIDE
    ] = 600.0
    grace_s: Annotated[
        float,
        Doc("seconds after a stop signal in which a rank that waits for others may still save"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = 20.0

    def __post_init__(self) -> None:
        normalise_types(self)
        if self.replicate < 0:
            raise ValueError(
                f"parallel.replicate={self.replicate} must be 0 (all ranks left) or more"
            )
        for name in ("shard", "tensor", "context", "expert", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        for name in ("timeout_s", "grace_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)} must be above 0 and at most 86400"
                )
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence=true splits tokens over the tensor ranks but "
                "parallel.tensor=1: use parallel.tensor of 2 or more, or sequence=false"
            )

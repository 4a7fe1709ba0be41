"""`gpt2 plan --ranks N`：一个 rank 的内存、一步的通信、通信要多久，各一张表。"""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.cli.shared.estimates import seconds
from app.cli.shared.tables import Table, print_table
from app.common.units import size
from app.training.config import TrainConfig

if TYPE_CHECKING:
    from app.planning.ranks import RanksPlan

_WHY = {
    "Sharded Param": "weights: the rows of this rank",
    "Unsharded Param": "weights gathered for the blocks in use",
    "Sharded Grad": "gradients: the rows of this rank, and the sums of earlier micro-batches",
    "Unsharded Grad": "gradients of a block before they are scattered",
    "Activation": "kept for the backward",
    "Temp": "in the backward",
    "All Gather": "buffers",
    "Reduce Scatter": "buffers",
    "OptState": "optimizer: the rows of this rank",
}


def show_ranks(config: TrainConfig, world: int, bandwidth: float | None) -> None:
    """
    Raises:
        ValueError: 分不匀，或这种并行还不能规划。
    """
    from app.planning.ranks import plan_ranks

    found = plan_ranks(config, world)
    print(
        f"{world:,} ranks: {found.replicate:,} copies, each on {found.shard:,} ranks; a step is "
        f"{found.rounds:,} micro-batches of {found.micro_batch:,} x "
        f"{config.model.context_size:,} tokens on each rank"
    )
    print("memory of a rank, as torch counts its tensors; the process itself comes on top")
    print_table(_memory(found))
    if not config.parallel.exact:
        print("note: with parallel.exact=false only the traffic was checked against real ranks")
    print("traffic of a rank in a step")
    print_table(_traffic(found, bandwidth))


def _memory(found: RanksPlan) -> Table:
    table: Table = [
        (kind.lower(), size(nbytes), _WHY[kind])
        for kind, nbytes in found.peak.items()
        if kind in _WHY and nbytes
    ]
    if found.held:
        table.append(("held sums", size(found.held), "the fixed tree over micro-batches"))
    how = "walked without data, every layer"
    if found.layers:
        how = f"walked without data with up to {found.layers} layers, extrapolated"
    return [*table, ("peak", size(found.peak["Total"] + found.held), how)]


def _traffic(found: RanksPlan, bandwidth: float | None) -> Table:
    table: Table = [("collective", "calls", "bytes", "")]
    for name, nbytes in found.calls.nbytes.items():
        table.append((name, f"{found.calls.count[name]:,}", size(nbytes), ""))
    table.append(("sent", "", size(found.wire), "the rank's own part stays"))
    if bandwidth is None:
        return [*table, ("time", "", "unknown", "give --bandwidth in GB/s")]
    why = f"at {bandwidth:g} GB/s, one after another; less where it overlaps with compute"
    return [*table, ("time", "", seconds(found.seconds(bandwidth)), why)]

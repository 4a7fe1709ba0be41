"""集合通信各自的意思，与固定树的位。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.distributed.comm import Ranks

from .ranks import run_ranks


def _everything() -> dict[str, Tensor | list[int] | str | None]:
    world = Ranks.world()
    mine = torch.arange(6.0).view(3, 2) + 10 * world.rank
    rows = [world.rank + 1] * world.size
    return {
        "sum": world.sum(mine.clone()),
        "max": world.max(mine.clone()),
        "tree": world.tree_sum(mine.clone()),
        "gather": world.gather(mine),
        "gather_scalar": world.gather(torch.tensor(float(world.rank))),
        "sum_scatter": world.sum_scatter(torch.stack([mine + j for j in range(world.size)])),
        "exchange": world.exchange(
            torch.tensor([[world.rank, j] for j in range(world.size)], dtype=torch.int64)
        ),
        "rows": world.exchange_rows(
            torch.full((sum(rows),), world.rank), rows, [j + 1 for j in range(world.size)]
        ),
        "pass_on": world.pass_on(mine),
        "shift": world.shift(mine, 1),
        "back": world.shift(mine, -1),
        "swap": mine if world.alone else world.swap(mine, world.rank ^ 1),
        "broadcast": world.broadcast(mine.clone(), world.size - 1),
        "agree": world.agree("one" if world.rank == 0 else None),
        "collect": world.collect(world.rank),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_collective_means_what_it_says(size: int) -> None:
    found = [_everything()] if size == 1 else run_ranks(size, _everything)
    base = torch.arange(6.0).view(3, 2)
    all_of = torch.stack([base + 10 * r for r in range(size)])
    for rank, got in enumerate(found):
        assert torch.equal(got["sum"], all_of.sum(0))
        assert torch.equal(got["max"], all_of[-1])
        assert torch.equal(got["tree"], all_of.sum(0))
        assert torch.equal(got["gather"], all_of)
        assert torch.equal(got["gather_scalar"], torch.arange(float(size)))
        assert torch.equal(got["sum_scatter"], (all_of + rank).sum(0))
        assert torch.equal(got["exchange"], torch.tensor([[j, rank] for j in range(size)]))
        want = [j for j in range(size) for _ in range(j + 1)]
        assert got["rows"].tolist() == want
        assert torch.equal(got["pass_on"], all_of[(rank - 1) % size])
        nothing = torch.zeros_like(base)
        assert torch.equal(got["shift"], all_of[rank - 1] if rank else nothing)
        assert torch.equal(got["back"], all_of[rank + 1] if rank + 1 < size else nothing)
        assert torch.equal(got["swap"], all_of[rank ^ 1 if size > 1 else 0])
        assert torch.equal(got["broadcast"], all_of[-1])
        assert got["agree"] == "one" and got["collect"] == list(range(size))


def _tree_of(leaves: Tensor) -> Tensor:
    world = Ranks.world()
    mine = leaves.chunk(world.size)[world.rank]
    while len(mine) > 1:
        mine = mine[0::2] + mine[1::2]
    return world.tree_sum(mine[0].clone())


def test_the_tree_gives_the_same_bits_for_every_number_of_ranks() -> None:
    leaves = torch.randn(4, 10_001) * torch.logspace(-6, 6, 4)[:, None]
    alone = (leaves[0] + leaves[1]) + (leaves[2] + leaves[3])
    assert not torch.equal(alone, ((leaves[0] + leaves[1]) + leaves[2]) + leaves[3])
    for size in (2, 4):
        assert all(torch.equal(alone, got) for got in run_ranks(size, _tree_of, leaves))


def _three() -> str:
    try:
        Ranks.world().tree_sum(torch.ones(2))
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_tree_of_three_ranks_is_refused() -> None:
    assert "got 3: use 2 ranks or parallel.exact=false" in run_ranks(3, _three)[0]

"""可求导的搬运：前向怎样搬，反向就反着搬（Shoeybi et al. 2019, arXiv:1909.08053 的 f、g）。

B 批、T 词元数、W rank 数、H 头数、n = T / W、D 头宽。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm import Ranks


class _Move(torch.autograd.Function):
    """一对函数：there 是前向，back 是它的转置。"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad[0]), None, None


def _move(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    y: Tensor = _Move.apply(x, there, back)
    return y


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def sum_back(x: Tensor, ranks: Ranks) -> Tensor:
    """原样；梯度是各 rank 之和（f）。"""
    return _move(x, _same, lambda g: ranks.sum(g.clone()))


def sum_forward(x: Tensor, ranks: Ranks) -> Tensor:
    """各 rank 之和；梯度原样（g）。"""
    return _move(x, lambda a: ranks.sum(a.clone()), _same)


def _gather(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    return torch.cat([*ranks.gather(x)], dim)


def _sum_scatter(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    return ranks.sum_scatter(torch.stack(x.chunk(ranks.size, dim)))


def gather_along(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """各 rank 的段拼成全部；梯度求和再分段。"""
    return _move(x, lambda a: _gather(a, dim, ranks), lambda g: _sum_scatter(g, dim, ranks))


def scatter_along(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """求和再分段；梯度拼成全部。"""
    return _move(x, lambda a: _sum_scatter(a, dim, ranks), lambda g: _gather(g, dim, ranks))


def _trade(x: Tensor, split: int, join: int, ranks: Ranks) -> Tensor:
    parts = ranks.exchange(torch.stack(x.chunk(ranks.size, split)))
    return torch.cat([*parts], join)


def trade(x: Tensor, split: int, join: int, ranks: Ranks) -> Tensor:
    """沿 split 切开分给各 rank，收来的沿 join 拼上：(B, H, n, D) <-> (B, H/W, T, D)。"""
    return _move(
        x, lambda a: _trade(a, split, join, ranks), lambda g: _trade(g, join, split, ranks)
    )


def trade_rows(x: Tensor, send: Sequence[int], receive: Sequence[int], ranks: Ranks) -> Tensor:
    """(sum(send), ...) -> (sum(receive), ...)。"""
    return _move(
        x,
        lambda a: ranks.exchange_rows(a, send, receive),
        lambda g: ranks.exchange_rows(g, receive, send),
    )


def with_halo(x: Tensor, halo: int, ranks: Ranks) -> Tensor:
    """(..., n, D) -> (..., halo + n, D)：前面接上左邻的最后 halo 个；rank 0 没有左邻，原样。"""
    first, last = ranks.rank == 0, ranks.rank == ranks.size - 1

    def there(a: Tensor) -> Tensor:
        came = ranks.shift(a[..., -halo:, :].contiguous(), 1)
        return _same(a) if first else torch.cat([came, a], -2)

    def back(g: Tensor) -> Tensor:
        lent = torch.zeros_like(g[..., :halo, :]) if first else g[..., :halo, :]
        returned = ranks.shift(lent.contiguous(), -1)
        mine = g.clone() if first else g[..., halo:, :].clone()
        if not last:
            mine[..., -halo:, :] += returned
        return mine

    return _move(x, there, back)

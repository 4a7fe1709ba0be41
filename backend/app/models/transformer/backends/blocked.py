"""分块的注意力：只对 tiles.py 点名的键打分；前向与反向的时间、内存都与块的总面积成正比。

softmax 在块内一次算完，反向重算分数而不保存（Dao et al. 2022, arXiv:2205.14135 的做法），
所以从不出现 T×T 的张量。同一查询的键分在几项里时，按 log-sum-exp 合并。

B 批、H 查询头数、G 键值头数、n = H / G、T 词元数、D 头宽；g、Q、K 见 tiles.py。
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiles import Rows, Tile, Tiling


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, dropout: float = 0.0
) -> Tensor:
    """q (B, H, T, D)、k/v (B, G, T, D) -> (B, H, T, D)。看不见任何键的查询得 0。"""
    seed = int(torch.randint(1 << 62, ())) if dropout else 0
    kv_heads = k.shape[1]
    y: Tensor = _Blocked.apply(
        q.unflatten(1, (kv_heads, -1)), k[:, :, None], v[:, :, None], tiling, dropout, seed
    )
    return y.flatten(1, 2)


class _Blocked(torch.autograd.Function):
    """五维：q (B, G, n, T, D)，k/v (B, G, 1, T, D)。"""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, dropout: float, seed: int
    ) -> Tensor:
        work = _Work(q, k, v, tiling, dropout, seed)
        y, lse = work.forward()
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.rest = tiling, dropout, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        work = _Work(q, k, v, *ctx.rest)
        return (*work.backward(y, lse, dy), None, None, None)


class _Work:
    """一次前向或反向共用的东西。"""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, dropout: float, seed: int
    ) -> None:
        self.q, self.k, self.v, self.tiling = q, k, v, tiling
        self.scale = 1 / math.sqrt(q.shape[-1])
        # 半精度的分数也用 float32 做 softmax。
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.dropout, self.seed = dropout, seed
        self.far_k, self.far_v = (_gather(x, tiling.columns) for x in (k, v))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """(y (B, G, n, T, D)，lse (B, G, n, T, 1))；只有一项时不需要 lse。"""
        if len(self.tiling.terms) == 1:
            y, lse = torch.empty_like(self.q), None
        else:
            y = torch.zeros_like(self.q, dtype=self.dtype)
            lse = y.new_full((*y.shape[:-1], 1), -math.inf)
        for tile, number in self._tiles():
            s = self._scores(tile, self._read(tile, self.k, self.far_k))
            p = s.softmax(-1)
            kept = self._drop(p, number).to(self.v.dtype)
            part = torch.bmm(kept, self._read(tile, self.v, self.far_v))
            if lse is None:
                _put(y, tile.q, part)
            else:
                # 最大的那个分数减去它的对数概率，省去再做一遍指数。
                here = s.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
                _merge(y, lse, tile.q, part, here)
        if self.tiling.blind is not None:
            y.masked_fill_(self.tiling.blind[:, None, None, :, None], 0.0)
        return y.to(self.q.dtype), lse

    def backward(self, y: Tensor, lse: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
        if self.tiling.blind is not None:
            dy = dy.masked_fill(self.tiling.blind[:, None, None, :, None], 0.0)
        delta = (dy * y).sum(-1, keepdim=True, dtype=self.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=self.dtype) for x in (self.q, self.k, self.v))
        far_dk, far_dv = (
            None if x is None else torch.zeros_like(x, dtype=self.dtype)
            for x in (self.far_k, self.far_v)
        )
        for tile, number in self._tiles():
            dy_here, q = _get(dy, tile.q), _get(self.q, tile.q)
            dp = torch.bmm(dy_here, self._read(tile, self.v, self.far_v).mT).to(self.dtype)
            k = self._read(tile, self.k, self.far_k)
            s = self._scores(tile, k)
            p = s.softmax(-1) if lse is None else s.sub_(_get(lse, tile.q)).exp_()
            kept = p
            if self.dropout:
                keep = self._keep(p, number)
                kept, dp = p * keep, dp.mul_(keep)
            ds = dp.sub_(_get(delta, tile.q)).mul_(p).mul_(self.scale).to(q.dtype)
            _add(dq, tile.q, torch.bmm(ds, k))
            _add_keys(dv, far_dv, tile, torch.bmm(kept.to(q.dtype).mT, dy_here))
            _add_keys(dk, far_dk, tile, torch.bmm(ds.mT, q))
        for grad, far in ((dk, far_dk), (dv, far_dv)):
            if far is not None:
                _scatter(grad, self.tiling.columns, far)
        return dq.to(self.q.dtype), dk.to(self.q.dtype), dv.to(self.q.dtype)

    def _tiles(self) -> Iterator[tuple[Tile, int]]:
        return ((t, i) for i, t in enumerate(chain.from_iterable(self.tiling.terms)))

    def _read(self, tile: Tile, keys: Tensor, far: Tensor | None) -> Tensor:
        """这一块读的键（或值），近处在前，远列在后：(B·G·g, K, D)。"""
        near = _get(keys, tile.near)
        if far is None or tile.far.stop == tile.far.start:
            return near
        # 拼起来是多搬一遍，但一次大的矩阵乘比两次、再读写不连续的分数快。
        return torch.cat([near, far[:, :, tile.far].flatten(0, 1)], 1)

    def _scores(self, tile: Tile, keys: Tensor) -> Tensor:
        """(B·G·g, n·Q, K)，精度 self.dtype。"""
        s = torch.bmm(_get(self.q, tile.q) * self.scale, keys.mT).to(self.dtype)
        if tile.bias is not None:
            heads, g, n = self.k.shape[1], tile.q.groups, self.q.shape[2]
            s.view(-1, heads, g, n, tile.q.count, s.shape[-1]).add_(tile.bias)
        return s

    def _drop(self, p: Tensor, number: int) -> Tensor:
        return p * self._keep(p, number) if self.dropout else p

    def _keep(self, p: Tensor, number: int) -> Tensor:
        """这一块的 dropout 系数；由种子与块号决定，反向时重新抽出同样的。"""
        generator = torch.Generator(p.device).manual_seed(self.seed + number)
        keep = torch.empty_like(p).bernoulli_(1 - self.dropout, generator=generator)
        return keep.div_(1 - self.dropout)


def _get(x: Tensor, rows: Rows) -> Tensor:
    """(B, G, n, T, D) 里的一块：(B·G·g, n·Q, D)；能不复制就不复制。"""
    return rows.of(x, 3).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _put(x: Tensor, rows: Rows, part: Tensor) -> None:
    target = rows.of(x, 3).transpose(2, 3)
    target.copy_(part.view(target.shape))


def _add(x: Tensor, rows: Rows, part: Tensor) -> None:
    target = rows.of(x, 3).transpose(2, 3)
    target += part.unflatten(0, target.shape[:3]).unflatten(-2, target.shape[3:5])


def _add_keys(near: Tensor, far: Tensor | None, tile: Tile, part: Tensor) -> None:
    """_read 的反向：part (B·G·g, K, D) 的前一段归近处，其余归远列。"""
    n = tile.near.count
    _add(near, tile.near, part[:, :n])
    if far is not None and part.shape[1] > n:
        target = far[:, :, tile.far]
        target += part[:, n:].reshape(target.shape)


def _merge(y: Tensor, lse: Tensor, rows: Rows, part: Tensor, here: Tensor) -> None:
    """并入一项：两份各按自己的 exp(lse) 占的份额相加。"""
    before = _get(lse, rows)
    total = torch.logaddexp(before, here)
    merged = _get(y, rows) * (before - total).exp_() + part * (here - total).exp_()
    _put(y, rows, merged)
    _put(lse, rows, total)


def _gather(x: Tensor, columns: Tensor | None) -> Tensor | None:
    """远列集中到一处：(B, G, N, D)。越界的补齐列取最后一列，谓词会遮住它。"""
    if columns is None:
        return None
    index = columns.clamp(max=x.shape[3] - 1)
    if len(index) == 1:
        return x[:, :, 0].index_select(2, index[0])
    rows = torch.arange(len(index), device=x.device)[:, None]
    return x[rows, :, 0, index].transpose(1, 2)


def _scatter(grad: Tensor, columns: Tensor | None, far: Tensor) -> None:
    """_gather 的反向；补齐列的梯度恰为 0，加到哪里都一样。"""
    assert columns is not None
    index = columns.clamp(max=grad.shape[3] - 1)
    if len(index) == 1:
        grad[:, :, 0].index_add_(2, index[0], far)
    else:
        grad[:, :, 0].scatter_add_(2, index[:, None, :, None].expand_as(far), far)

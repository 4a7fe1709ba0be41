"""环形注意力（Liu et al. 2023, arXiv:2310.01889）：键值绕一圈，各段的结果按 log-sum-exp 合并。

反向里键值再绕一圈，它们的梯度跟着走，走完 W 步恰好回到主人那里。分数重算而不保存。
后面的段总在查询之后（行内位置与文档号都不减），静态地跳过。
B 批、G 键值头数、r = H / G、n 一段的词元数、D 头宽、W rank 数。
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from app.models.transformer.visibility.pattern import Pattern
from app.models.transformer.visibility.positions import Positions
from app.models.transformer.visibility.rule import visible

from ..comm import Ranks

# 一次打分的查询数：分数是 (B, H, 这么多, n)。
QUERIES = 256


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, spans: Sequence[Positions], pattern: Pattern
) -> Tensor:
    """q (B, H, n, D)、k/v (B, G, n, D) -> (B, H, n, D)；spans 是各 rank 的坐标。"""
    five = q.unflatten(1, (k.shape[1], -1))
    y: Tensor = _Ring.apply(five, torch.stack([k, v]), ranks, spans, pattern)
    return y.flatten(1, 2)


class _Ring(torch.autograd.Function):
    """q (B, G, r, n, D)、kv (2, B, G, n, D)。"""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, ranks: Ranks, spans: Sequence[Positions], pattern: Pattern
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        y = torch.zeros_like(q, dtype=wide)
        lse = y.new_full((*y.shape[:-1], 1), -math.inf)
        turning = kv
        for owner in _owners(ranks):
            for rows, seen in _visible(ranks, spans, owner, pattern):
                s = _scores(q[..., rows, :], turning[0], seen, wide)
                before = lse[..., rows, :]
                total = torch.logaddexp(before, s.logsumexp(-1, keepdim=True))
                safe = _finite(total)
                y[..., rows, :] *= (before - safe).exp()
                y[..., rows, :] += s.sub_(safe).exp_() @ turning[1, :, :, None].to(wide)
                lse[..., rows, :] = total
            if owner != (ranks.rank + 1) % ranks.size:
                turning = ranks.pass_on(turning)
        out = y.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.rest = ranks, spans, pattern
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, turning, y, lse = ctx.saved_tensors
        ranks, spans, pattern = ctx.rest
        scale = 1 / math.sqrt(q.shape[-1])
        dy = dy.to(lse.dtype)
        delta = (dy * y).sum(-1, keepdim=True)
        dq, dkv = torch.zeros_like(dy), torch.zeros_like(turning, dtype=lse.dtype)
        for owner in _owners(ranks):
            k, v = turning[:, :, :, None].to(lse.dtype)
            for rows, seen in _visible(ranks, spans, owner, pattern):
                s = _scores(q[..., rows, :], turning[0], seen, lse.dtype)
                p = s.sub_(_finite(lse[..., rows, :])).exp_()
                here = dy[..., rows, :]
                ds = (here @ v.mT).sub_(delta[..., rows, :]).mul_(p).mul_(scale)
                dq[..., rows, :] += ds @ k
                dkv[0] += (ds.mT @ q[..., rows, :].to(lse.dtype)).sum(2)
                dkv[1] += (p.mT @ here).sum(2)
            if owner != (ranks.rank + 1) % ranks.size:
                turning = ranks.pass_on(turning)
            dkv = ranks.pass_on(dkv)
        return dq.to(q.dtype), dkv.to(q.dtype), None, None, None


def _owners(ranks: Ranks) -> Iterator[int]:
    """第 j 步手里是 rank - j 的键值。"""
    return ((ranks.rank - j) % ranks.size for j in range(ranks.size))


def _visible(
    ranks: Ranks, spans: Sequence[Positions], owner: int, pattern: Pattern
) -> Iterator[tuple[slice, Tensor]]:
    """(查询的一块, 它看 owner 那一段的掩码 (B|1, 1, 1, 块, n))。"""
    if owner > ranks.rank:
        return
    mine = spans[ranks.rank]
    for start in range(0, mine.length, QUERIES):
        rows = slice(start, min(start + QUERIES, mine.length))
        yield rows, visible(mine.take(rows), spans[owner], pattern)[:, None, None]


def _scores(q: Tensor, k: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, G, r, 块, n)，看不见处 -inf。"""
    s = ((q / math.sqrt(q.shape[-1])) @ k[:, :, None].mT).to(dtype)
    return s.masked_fill_(~seen, -math.inf)


def _finite(lse: Tensor) -> Tensor:
    """什么键也还没看见的行：减 0 而不减 -inf，指数得 0 而不是 NaN。"""
    return lse.masked_fill(lse == -math.inf, 0.0)

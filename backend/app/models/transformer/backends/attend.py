"""注意力的各个后端：十行的参考实现、SDPA、分块、FlexAttention。数值一致由测试保证。

B 批、H 查询头数、G 键值头数（H 的约数）、Tq/Tk 查询/键数、D 头宽。
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocked import blocked_attention
from .mask_plan import MaskPlan


def attention_weights(q: Tensor, k: Tensor, plan: MaskPlan) -> Tensor:
    """softmax(q·kᵀ/√D)：(B, H, Tq, Tk)。看不见任何键的行（填充）全为 0，不是 NaN。"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    mask = plan.dense()
    # 用有限的最小值而不用 -inf：全被遮住的行 softmax 不出 NaN，梯度也不出。
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~mask, 0.0)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, dropout: float = 0.0
) -> Tensor:
    """慢而可读的孪生：一切快路径都与它比较。形状同 attend。"""
    weights = F.dropout(attention_weights(q, k, plan), dropout)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, dropout: float = 0.0) -> Tensor:
    return _sdpa(q, k, v, plan.mask, dropout, causal=plan.causal)


def attend_blocked(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, dropout: float = 0.0) -> Tensor:
    assert plan.tiling is not None
    # 块的循环若展开进编译的图，图会大到编译不完；留在图外，各块本来就只是几次矩阵乘。
    # 平时不去碰 torch.compiler.disable：它要导入的 torch._dynamo 与 torch 一样慢。
    run = blocked_attention
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(run)
    y = run(q, k, v, plan.tiling, dropout)
    rows = plan.global_queries
    if rows is None:
        return y
    index = rows.index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return y.scatter(2, index, _sdpa(q.gather(2, index), k, v, rows.mask, dropout))


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, dropout: float = 0.0) -> Tensor:
    # torch 的 FlexAttention 导入很慢，用到才导入。
    from .flex import attend_flex

    return attend_flex(q, k, v, plan, dropout)


def attend_parts(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, dropout: float = 0.0) -> Tensor:
    """没有填充的一步（cache/row_cache.py）：q (N, H, 1, D)，每个词元自成一行；k/v 是缓存的行。

    各部分各走自己的后端；一部分不是一行的几个词元，就是几行各一个词元。
    """
    done = []
    for part in plan.parts:
        one = part.rows.stop - part.rows.start == 1
        queries = q[part.tokens].permute(2, 1, 0, 3) if one else q[part.tokens]
        keys, values = (x[part.rows, :, : part.keys] for x in (k, v))
        y = _BACKENDS[part.plan.backend](queries, keys, values, part.plan, dropout)
        done.append(y.permute(2, 1, 0, 3) if one else y)
    return done[0] if len(done) == 1 else torch.cat(done)


_BACKENDS = {
    "reference": attend_reference,
    "sdpa": attend_sdpa,
    "blocked": attend_blocked,
    "flex": _flex,
    "parts": attend_parts,
}


def attend(q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, *, dropout: float) -> Tensor:
    """q (B, H, Tq, D)、k/v (B, G, Tk, D) -> (B, H, Tq, D)。"""
    return _BACKENDS[plan.backend](q, k, v, plan, dropout)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        # SDPA 的因果标志对齐左上角，只在查询与键从同一处开始时正确；MaskPlan 保证这一点。
        is_causal=causal,
        enable_gqa=k.shape[1] != q.shape[1],
    )

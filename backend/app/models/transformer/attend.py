"""注意力的两个后端：十行的参考实现，与 SDPA。二者的数值一致由测试保证。

B 批、H 查询头数、G 键值头数（H 的约数）、Tq/Tk 查询/键数、D 头宽。
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Backend
from .masking import MaskPlan


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
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=plan.mask,
        dropout_p=dropout,
        # SDPA 的因果标志对齐左上角，只在查询与键从同一处开始时正确；MaskPlan 保证这一点。
        is_causal=plan.kind == "causal",
        enable_gqa=k.shape[1] != q.shape[1],
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: MaskPlan, *, dropout: float, backend: Backend
) -> Tensor:
    """q (B, H, Tq, D)、k/v (B, G, Tk, D) -> (B, H, Tq, D)。"""
    run = attend_reference if choose_backend(backend)[0] == "reference" else attend_sdpa
    return run(q, k, v, plan, dropout)


def choose_backend(asked: Backend) -> tuple[str, str]:
    """(后端, 英文的理由)；命令行与日志照样说给人听。"""
    if asked == "auto":
        return "sdpa", "auto: fused kernels on every device, full causal attention"
    return asked, "asked for"

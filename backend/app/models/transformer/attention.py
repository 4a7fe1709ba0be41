"""多头因果自注意力（Vaswani et al. 2017, 第 3.2.2 节），键值头可少于查询头（GQA）。

B 批、T 词元数、C 宽度、H 查询头数、G 键值头数、D 头宽 = C / H。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends.attend import attend, attention_weights
from .config import GPT2Config
from .layers.context import Context
from .layers.fused import attention_parts
from .layers.linear import Linear
from .layers.norm import RMSNorm


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.dropout_p = config.dropout
        width = sum(attention_parts(config).values())
        self.c_attn = Linear(config.n_embed, width, bias=config.bias)
        self.c_proj = Linear(config.n_embed, config.n_embed, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        # Henry et al. 2020, arXiv:2010.04245；各头共用一组尺度。
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)。"""
        fused = self.c_attn(x)
        # 不取自 x：张量并行时 c_attn 收一段词元、给全部词元的几个头。
        B, T, _ = fused.shape
        heads = fused.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H+2G, T, D)
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        if ctx.rotary is not None:
            qk = ctx.rotary.apply(qk)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if ctx.step is not None:
            k, v = ctx.step.write(ctx.layer, k, v)
        return self.dropout(self.c_proj(self.attend(q, k, v, ctx).reshape(B, T, -1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """q (B, H, T, D)、k/v (B, G, S, D) -> (B, T, H, D)。别的运行时的注意力从这里接上。"""
        if "map" in ctx.note.wishes:
            ctx.note.map = attention_weights(q, k, ctx.plan)
        dropout = self.dropout_p if self.training else 0.0
        return attend(q, k, v, ctx.plan, dropout=dropout).transpose(1, 2)

"""全部初始化都在这里；meta 设备上什么也不做。

GPT-2 的标准差 0.02 是对宽度 768 定的：宽度更小时同一个数会让信号随层数消失，
所以小于 768 时乘 sqrt(768 / 宽度)，使每层的增益与 GPT-2 small 相同。
残差分支的出口再除以 sqrt(2N)（Radford et al. 2019, 第 2.3 节；N 层有 2N 个分支）。
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..block import Block
from ..config import GPT2Config
from ..embeddings import Embedding
from ..experts.grouped import GroupedLinear
from ..experts.router import Router
from ..mlp import MLP
from .linear import Linear

if TYPE_CHECKING:
    from ..model import GPT2Model

_REFERENCE_WIDTH = 768
# 路由器的打分起初要小而各不相同：大了一开始就偏，全零则次次选前 k 号。
ROUTER_STD = 0.006


def base_std(config: GPT2Config) -> float:
    return 0.02 * max(1.0, math.sqrt(_REFERENCE_WIDTH / config.n_embed))


def residual_std(config: GPT2Config) -> float:
    return base_std(config) / math.sqrt(2 * config.n_layer)


def deepnorm_gain(n_layer: int) -> float:
    """只有解码器时 v、out、fc1、fc2 的 Xavier 增益（arXiv:2203.00555, 图 2）。"""
    return (8 * n_layer) ** -0.25


@torch.no_grad()
def initialize(model: GPT2Model) -> None:
    """按配置写好每个参数。随机数按模块的固定顺序取，所以同一个种子给出同一个模型。"""
    if model.embed.wte.weight.is_meta:
        # 没有数可写；而 torch 头一次在 meta 上取随机数要导入几秒的分解表。
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(
            module, Linear | Embedding
        ):
            raise TypeError(f"{type(module).__name__} would keep torch's own initialisation")
        initialize_leaf(module, model.config)
    for block in model.h.values():
        assert isinstance(block, Block)
        initialize_block(block, model.config)


def initialize_leaf(module: nn.Module, config: GPT2Config) -> None:
    """一个归一化、线性层、嵌入、叠起来的专家或路由器；别的模块什么也不做。"""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.reset_parameters()
    elif isinstance(module, nn.Linear | nn.Embedding | GroupedLinear):
        nn.init.normal_(module.weight, std=base_std(config))
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Router):
        nn.init.normal_(module.weight, std=ROUTER_STD)
        if module.selection_bias is not None:
            nn.init.zeros_(module.selection_bias)


def initialize_block(block: Block, config: GPT2Config) -> None:
    """一层里与 initialize_leaf 不同的投影。"""
    if config.norm == "deepnorm":
        xavier(block, deepnorm_gain(config.n_layer))
        return
    # keel 也一样：Xavier 会让第一层（α = 1）淹没嵌入，见 docs/decisions/004。
    for projection in (block.attn.c_proj, *(second for _, second in feed_forwards(block))):
        nn.init.normal_(projection.weight, std=residual_std(config))


Layer = Linear | GroupedLinear


def feed_forwards(block: Block) -> list[tuple[Layer, Layer]]:
    """一层里各前馈的 (c_fc, c_proj)：稠密的一个；MoE 是叠起来的专家，与共享专家。"""
    if isinstance(block.mlp, MLP):
        return [(block.mlp.c_fc, block.mlp.c_proj)]
    pairs: list[tuple[Layer, Layer]] = [(block.mlp.experts.c_fc, block.mlp.experts.c_proj)]
    if block.mlp.shared is not None:
        pairs.append((block.mlp.shared.c_fc, block.mlp.shared.c_proj))
    return pairs


def xavier(block: Block, gain: float) -> None:
    """q、k 增益 1，v 与其余投影增益 gain；按各自的 (out, in) 而不是合并矩阵的形状算。"""
    attn = block.attn
    width = attn.kv_heads * attn.head_dim
    q, k, v = attn.c_attn.weight.split([attn.heads * attn.head_dim, width, width])
    for weight, g in ((q, 1.0), (k, 1.0), (v, gain)):
        nn.init.xavier_normal_(weight, g)
    for module in (attn.c_proj, *(layer for pair in feed_forwards(block) for layer in pair)):
        # 叠起来的专家各是一个矩阵；对三维张量算 Xavier 会把专家数当成输出宽。
        for weight in module.weight if isinstance(module, GroupedLinear) else (module.weight,):
            nn.init.xavier_normal_(weight, gain)

"""全部初始化都在这里；meta 设备上什么也不做。

第一遍，每个叶子自己说的（类属性 init_std；None = base）：

| 参数                               | 分布                   |
|------------------------------------|------------------------|
| wte、wpe、lm_head、c_attn、c_fc    | N(0, base)             |
| c_proj（注意力的与前馈的）         | 同上，见下             |
| 路由器                             | N(0, 它自己的 init_std)|
| 偏置、selection_bias               | 0                      |
| 归一化的增益                       | 1                      |

第二遍，各层里与此不同的（叠起来的专家各是一个矩阵）：

| norm             | 参数                       | 分布                        |
|------------------|----------------------------|-----------------------------|
| pre、post、keel  | c_proj                     | N(0, base / sqrt(2N))       |
| deepnorm         | c_attn 的 q、k             | Xavier，增益 1              |
|                  | v、c_fc（门与值各算）、c_proj | Xavier，增益 (8N)^(-1/4) |

N 层数，有 2N 个残差分支（除以 sqrt(2N)：Radford et al. 2019, 第 2.3 节）。
base = 0.02·max(1, sqrt(768 / 宽度))：GPT-2 的 0.02 是对宽度 768 定的，宽度更小时同一个数会让
信号随层数消失；这样每层的增益与 GPT-2 small 相同。
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import GPT2Config
from .fused import parts_of

_REFERENCE_WIDTH = 768
_PROJECTIONS = ("c_attn", "c_fc", "c_proj")


def base_std(config: GPT2Config) -> float:
    return 0.02 * max(1.0, math.sqrt(_REFERENCE_WIDTH / config.n_embed))


def residual_std(config: GPT2Config) -> float:
    return base_std(config) / math.sqrt(2 * config.n_layer)


def deepnorm_gain(n_layer: int) -> float:
    """只有解码器时 v、out、fc1、fc2 的 Xavier 增益（arXiv:2203.00555, 图 2）。"""
    return (8 * n_layer) ** -0.25


@torch.no_grad()
def initialize(model: nn.Module, config: GPT2Config) -> None:
    """按配置写好每个参数。随机数按模块的固定顺序取，所以同一个种子给出同一个模型。

    Raises:
        TypeError: 有模块带着参数，却既不是归一化、也没有 init_std。
    """
    if next(model.parameters()).is_meta:
        # 没有数可写；而 torch 头一次在 meta 上取随机数要导入几秒的分解表。
        return
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)) and not _has_law(module):
            raise TypeError(
                f"{type(module).__name__} would keep torch's own initialisation: "
                "give the class init_std"
            )
        initialize_leaf(module, config)
    initialize_block(model, config)


def initialize_leaf(module: nn.Module, config: GPT2Config) -> None:
    """第一遍里的一个模块：一个归一化，或有 init_std 的叶子；别的什么也不做。"""
    if _is_norm(module):
        module.reset_parameters()  # type: ignore[operator]
    elif _has_law(module):
        std = base_std(config) if module.init_std is None else module.init_std
        assert isinstance(std, float)
        for name, tensor in _own_tensors(module):
            if name == "weight":
                nn.init.normal_(tensor, std=std)
            else:
                nn.init.zeros_(tensor)


def initialize_block(block: nn.Module, config: GPT2Config) -> None:
    """第二遍：一层（或整个模型）里与第一遍不同的投影。"""
    if config.norm == "deepnorm":
        xavier(block, config, deepnorm_gain(config.n_layer))
        return
    # keel 也一样：Xavier 会让第一层（α = 1）淹没嵌入，见 docs/decisions/004。
    for name, weight in _projections(block):
        if name == "c_proj":
            nn.init.normal_(weight, std=residual_std(config))


def xavier(block: nn.Module, config: GPT2Config, gain: float) -> None:
    """q、k 增益 1，v 与其余投影增益 gain；按各自的 (out, in) 而不是合并矩阵的形状算。"""
    for name, weight in _projections(block):
        # 叠起来的专家各是一个矩阵；对三维张量算 Xavier 会把专家数当成输出宽。
        for one in weight if weight.ndim == 3 else (weight,):
            parts = parts_of(name, one.shape[0], config)
            for part, rows in zip(parts, one.split(list(parts.values())), strict=True):
                nn.init.xavier_normal_(rows, 1.0 if part in ("q", "k") else gain)


def _projections(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(c_attn、c_fc 或 c_proj, 权重)，按模块的次序。"""
    for path, module in block.named_modules():
        name = path.rpartition(".")[2]
        if name in _PROJECTIONS:
            assert isinstance(module.weight, Tensor)
            yield name, module.weight


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.RMSNorm)


def _has_law(module: nn.Module) -> bool:
    return _is_norm(module) or hasattr(type(module), "init_std")

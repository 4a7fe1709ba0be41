"""没有哪个 rank 持有整个模型的开始：在 meta 设备上造、切好，再逐个叶子填上各自的几行。

随机数按一个进程的次序取：整个叶子初始化完，留下我的几行，丢掉其余；所以同一个种子给出的权重与
一个进程逐位相同，同时至多多占一个叶子。DTensor 自己的随机初始化做不到（pytorch #168058）。
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.init import initialize_block, initialize_leaf

from .rows import local, rows_of


def empty_model(config: GPT2Config) -> GPT2Model:
    """meta 设备上的模型，没有一个数。"""
    with torch.device("meta"):
        return GPT2Model(config)


@torch.no_grad()
def initialize_shards(model: GPT2Model, config: GPT2Config, device: torch.device) -> None:
    """切好的 meta 模型 -> 有了内存与初始的权重；随机数的状态也与一个进程的相同。"""
    model.to_empty(device=device)
    leaves = [(n, m) for n, m in model.named_modules() if m._parameters or m._buffers]
    for _, module in leaves:
        with _whole(module) as twin:
            initialize_leaf(twin, config)
    # 第二遍只动投影；一个投影装在一个空壳里，初始化的规矩仍由 layers/init.py 说。
    for name, module in leaves:
        with _whole(module) as twin:
            shell = nn.Module()
            shell.add_module(name.rpartition(".")[2], twin)
            initialize_block(shell, config)


@contextmanager
def _whole(module: nn.Module) -> Iterator[nn.Module]:
    """module 的替身，自己的张量是整个的、还没有值；出来时写过的那些，我的几行已在 module 里。"""
    own = {**module._parameters, **module._buffers}
    held = {name: value for name, value in own.items() if value is not None}
    # 切好的也按整个的形状；没有写过的内存不占地方。
    blank = {n: torch.empty(v.shape, dtype=v.dtype, device="cpu") for n, v in held.items()}
    twin = copy.copy(module)
    twin._modules, twin._buffers = {}, {}
    twin._parameters = dict.fromkeys(own)
    for name, tensor in blank.items():
        twin._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    before = {name: p._version for name, p in twin.named_parameters()}
    yield twin
    for name, whole in twin.named_parameters():
        if whole._version != before[name]:
            rows, mine = rows_of(held[name]), local(held[name])
            mine.copy_(whole.view(rows.whole, -1)[rows.first :][: rows.number].view(mine.shape))

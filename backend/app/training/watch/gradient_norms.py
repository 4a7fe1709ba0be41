"""各层组的梯度范数：哪一层的梯度消失或爆炸，只看总范数看不出。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def gradient_norms(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """{层组: 范数}；每块一组，块外的每个模块一组。与设备只同步一次。

    各组平方之和等于总范数的平方。
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    if not groups:
        return {}
    norms = torch.stack([nn.utils.get_total_norm(grads).float() for grads in groups.values()])
    return dict(zip(groups, norms.tolist(), strict=True))


def norms_of_rows(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """同样的，由 {参数名: 各行的平方和}。"""
    groups: dict[str, list[Tensor]] = {}
    for name, squares in rows.items():
        groups.setdefault(group_of(name), []).append(squares.sum())
    norms = torch.stack([torch.stack(squares).sum().sqrt() for squares in groups.values()])
    return dict(zip(groups, norms.tolist(), strict=True))


def group_of(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"block {rest.split('.')[0]}" if first == "h" else first

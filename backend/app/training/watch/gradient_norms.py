"""各层组的梯度范数：哪一层的梯度消失或爆炸，只看总范数看不出。"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def gradient_norms(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """{层组: 范数}；每块一组，块外的每个模块一组。与设备只同步一次。

    各组平方之和等于总范数的平方。
    """
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None:
            first, _, rest = name.partition(".")
            group = f"block {rest.split('.')[0]}" if first == "h" else first
            groups.setdefault(group, []).append(parameter.grad)
    if not groups:
        return {}
    norms = torch.stack([nn.utils.get_total_norm(grads).float() for grads in groups.values()])
    return dict(zip(groups, norms.tolist(), strict=True))

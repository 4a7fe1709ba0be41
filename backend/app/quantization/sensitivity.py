"""大小的预算：先量出每个矩阵降到低位的代价，再让代价最小的先降。

代价是只有它降下去时的 KL；校准的窗口上量，别的矩阵都还是浮点。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from app.models.transformer import GPT2Model

from .codes import Scheme
from .rtn import round_to_nearest

FLOAT32_BYTES = 4


@torch.no_grad()
def sensitivities(
    model: GPT2Model,
    schemes: Mapping[str, Scheme],
    ids: Tensor,
    advance: Callable[[int], object],
) -> dict[str, float]:
    """{矩阵: 只有它用这种存法时，每个位置的 KL}；ids (W, T)，每量完一个叫一次 advance(W·T)。"""
    ids, found = ids.to(model.device), {}
    before = [model(row[None])["logits"].float().log_softmax(-1) for row in ids]
    for name, scheme in schemes.items():
        total = 0.0
        with _lowered(model, name, scheme):
            for row, p in zip(ids, before, strict=True):
                q = model(row[None])["logits"].float().log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
        found[name] = total / ids.numel()
        advance(ids.numel())
    return found


@contextmanager
def _lowered(model: GPT2Model, name: str, scheme: Scheme) -> Iterator[None]:
    weight = model.get_parameter(name)
    kept = weight.detach().clone()
    weight.copy_(round_to_nearest(weight, scheme, name).dequantize())
    try:
        yield
    finally:
        weight.copy_(kept)


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme]) -> int:
    """各矩阵按存法，其余的 float32；shapes 是 expected_shapes 的全部。"""
    total = 0
    for name, shape in shapes.items():
        full = torch.Size(shape).numel() * FLOAT32_BYTES
        total += schemes[name].nbytes(shape) if name in schemes else full
    return total


def fit_budget(
    shapes: Mapping[str, tuple[int, ...]],
    low: Mapping[str, Scheme],
    high: Mapping[str, Scheme],
    cost: Mapping[str, float],
    budget: float,
) -> dict[str, Scheme]:
    """在 budget（占 float32 的几分之几）之内，让代价大的矩阵用 high，其余 low。

    按每省一个字节的代价由小到大地降，降到放得下为止；cost 里没有的矩阵不在选择之列。

    Raises:
        ValueError: 全用 low 也放不下；点名最小的预算。
    """
    full = stored_bytes(shapes, {})
    allowed = budget * full
    least = stored_bytes(shapes, low)
    if least > allowed:
        raise ValueError(
            f"budget={budget:g} cannot be met: everything in its fewest bits takes "
            f"{least / full:.4f} of the float32 size; use --budget {_up(least / full):g}, a wider "
            "--group, or --head-bits 4"
        )
    chosen = dict(high)
    size = stored_bytes(shapes, chosen)
    saved = {
        name: high[name].nbytes(shapes[name]) - low[name].nbytes(shapes[name]) for name in cost
    }
    for name in sorted(cost, key=lambda each: cost[each] / max(saved[each], 1)):
        if size <= allowed:
            break
        chosen[name] = low[name]
        size -= saved[name]
    return chosen


def _up(share: float) -> float:
    """三位小数，往上。"""
    return -(-share * 1000 // 1) / 1000

"""GPTQ：逐列取整，每一列的误差由还没取整的列补上（Frantar et al. 2022, arXiv:2210.17323）。

补多少由输入的二阶矩 H = Σ x·xᵀ 定：层的输出误差 tr(E·H·Eᵀ) 因此最小。
O 输出数、I 输入宽。
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Codes, Scheme
from .rtn import Grid, from_grid

# 对角线上加平均的百分之一（论文 3.3 节）：校准的词元少于 I 时 H 不满秩。
DAMPING = 0.01
# 每行一个尺度时一次补多少列：只影响速度。
_BLOCK = 128


class Moments:
    """H (I, I) float64，一批一批地加。"""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x (..., I)：这一层的输入。"""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.total += flat.t() @ flat
        self.rows += flat.shape[0]


def gptq(weight: Tensor, moments: Tensor, scheme: Scheme, name: str = "the matrix") -> Codes:
    """(O, I) -> 码；moments (I, I) 是 H。

    Raises:
        ValueError: 16 位没有可补的，组不整除宽，权重装不进格子，或 H 不是有限数。
    """
    if scheme.bits == 16:
        raise ValueError(f"{name}: GPTQ is for 8 and 4 bits; 16 bits are rounded to nearest")
    width = weight.shape[1]
    scheme.check_width(width, name)
    if not bool(torch.isfinite(moments).all()):
        raise ValueError(f"{name}: its inputs on the calibration data hold NaN or infinity")
    left = weight.detach().double().clone()
    inverse = _inverse_factor(moments.double())
    row = None if scheme.group else Grid.of(left.unflatten(1, (1, -1)), scheme, name)
    step, codes, grids = scheme.group or _BLOCK, torch.empty_like(left), []
    for start in range(0, width, step):
        end = min(start + step, width)
        # 组的格子由补过误差的权重定。
        grid = row or Grid.of(left[:, None, start:end], scheme, name)
        grids.append(grid)
        errors = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            codes[:, i] = grid.codes(left[:, None, i : i + 1]).flatten()
            wrong = left[:, i] - grid.values(codes[:, None, i : i + 1]).flatten()
            errors[:, i - start] = wrong / inverse[i, i]
            left[:, i:end] -= torch.outer(errors[:, i - start], inverse[i, i:end])
        left[:, end:] -= errors @ inverse[start:end, end:]
    return from_grid(codes, scheme, row or _joined(grids))


def _inverse_factor(moments: Tensor) -> Tensor:
    """H⁻¹ 的上三角 Cholesky 因子：它的第 i 行就是第 i 列的误差该怎样分给后面的列。"""
    moments = moments.clone()
    diagonal = moments.diagonal()
    # 校准时恒为零的输入什么也没说：那一列照常取整，谁也不补谁。
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True)


def _joined(grids: list[Grid]) -> Grid:
    """各组的格子接成 (O, G, 1)。"""
    first = grids[0]
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return Grid(
        first.low,
        first.high,
        first.zero,
        torch.cat([grid.scale for grid in grids], 1),
        torch.cat(minima, 1) if minima else None,
    )

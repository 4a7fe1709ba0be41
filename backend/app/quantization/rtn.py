"""取整到最近：每行或每组定一个格子，各权重取最近的一格。不要数据。

O 输出数、I 输入宽、g 组宽。先把尺度舍入到存盘的精度，再算码：反过来就会多一份误差。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import MAX_INT4, MAX_INT8, ZERO_INT4, Codes, Scheme, pack

_TINY, _LARGEST = 2.0**-24, torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Grid:
    """一列格子：值 = (码 - zero)·scale + minimum，码在 low..high。scale、minimum (..., 1)。"""

    low: int
    high: int
    zero: int
    scale: Tensor
    minimum: Tensor | None

    @classmethod
    def of(cls, values: Tensor, scheme: Scheme, name: str) -> Grid:
        """values (..., g)：共用一个尺度的权重。

        Raises:
            ValueError: 权重大得 float16 的尺度装不下，或不是有限数。
        """
        if scheme.asymmetric:
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
            # 零总在格子的范围里，全正的组也不会离它太远。
            minimum = _stored(low.clamp(max=0.0), name)
            scale = _scale((high.clamp(min=0.0) - minimum) / MAX_INT4, name)
            return cls(0, MAX_INT4, 0, scale, minimum)
        most = values.abs().amax(-1, keepdim=True)
        if scheme.bits == 8:
            return cls(-MAX_INT8, MAX_INT8, 0, _scale(most / MAX_INT8, name), None)
        high_code = MAX_INT4 - ZERO_INT4
        return cls(0, MAX_INT4, ZERO_INT4, _scale(most / high_code, name), None)

    def codes(self, values: Tensor) -> Tensor:
        """(..., g) -> 最近的码，仍是浮点。"""
        shifted = values if self.minimum is None else values - self.minimum
        return (shifted / self.scale).round_().add_(self.zero).clamp_(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        scaled = (codes - self.zero) * self.scale
        return scaled if self.minimum is None else scaled + self.minimum


def round_to_nearest(weight: Tensor, scheme: Scheme, name: str = "the matrix") -> Codes:
    """(..., O, I) -> 码。

    Raises:
        ValueError: 组不整除宽，或权重装不进这种格子；点名 name。
    """
    scheme.check_width(weight.shape[-1], name)
    if scheme.bits == 16:
        return Codes(16, check_half(weight.detach(), name))
    weight = weight.detach().float()
    grouped = weight.unflatten(-1, (-1, scheme.group or weight.shape[-1]))
    grid = Grid.of(grouped, scheme, name)
    return from_grid(grid.codes(grouped).flatten(-2), scheme, grid)


def from_grid(codes: Tensor, scheme: Scheme, grid: Grid) -> Codes:
    """codes (..., O, I) 浮点；grid 的 scale (..., O, G, 1)。"""
    scale = grid.scale.squeeze(-1).half()
    if scheme.bits == 8:
        return Codes(8, codes.to(torch.int8), scale)
    minimum = None if grid.minimum is None else grid.minimum.squeeze(-1).half()
    return Codes(4, pack(codes), scale, minimum, scheme.group)


def check_half(weight: Tensor, name: str) -> Tensor:
    """float16 的一份。

    Raises:
        ValueError: 有装不下的数。
    """
    half = weight.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(
            f"{name} holds values up to {float(weight.abs().max()):.3g}, beyond float16's "
            f"{_LARGEST:.0f}: it cannot be stored in 16 bits"
        )
    return half


def _scale(wanted: Tensor, name: str) -> Tensor:
    """存得下的尺度；全零的行是 1，极小的行用最小的正数。"""
    scale = _stored(wanted, name).clamp(min=_TINY)
    return torch.where(wanted > 0, scale, 1.0)


def _stored(wanted: Tensor, name: str) -> Tensor:
    """舍入到 8 个有效位又在 float16 里：两种 16 位浮点里都是同一个数。"""
    return check_half(wanted.bfloat16(), name).to(wanted.dtype)

"""规范的码：一个矩阵怎样存成 16、8 或 4 位，又怎样还原成浮点。

O 输出数、I 输入宽、G = I / group。
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """一个 (O, I) 的矩阵。

    Attributes:
        bits: 16、8 或 4。
        codes: 16：(O, I) float16；8：(O, I) int8；4：(O, I/2) uint8，低四位是偶数列。
        scale: 8：(O, 1)；4：(O, G)；float16。16 位没有。
        minimum: 非对称的 4 位才有，(O, G)：值 = 码·scale + minimum。对称时值 = (码 - 8)·scale。
        group: 4 位时几列共用一个尺度。
    """

    bits: int
    codes: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        outs, columns = self.codes.shape
        return outs, columns * (2 if self.bits == 4 else 1)

    def dequantize(self) -> Tensor:
        """(O, I) float32。"""
        return self._floats(self.codes, self.scale, self.minimum)

    def outputs(self, which: slice) -> Codes:
        """只要其中几个输出，不复制。"""
        return self._at(which)

    def expert(self, index: int) -> Codes:
        """叠着的 (E, O, ·) 里的一个，不复制。"""
        return self._at(index)

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., I) float32：查表。"""
        parts = (None if t is None else t[ids.reshape(-1)] for t in (self.scale, self.minimum))
        return self._floats(self.codes[ids.reshape(-1)], *parts).view(*ids.shape, -1)

    def _floats(self, codes: Tensor, scale: Tensor | None, minimum: Tensor | None) -> Tensor:
        if scale is None:
            return codes.float()
        if self.bits == 8:
            return codes.float() * scale.float()
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).float()
        grouped = nibbles.unflatten(1, (-1, self.group))
        if minimum is None:
            return ((grouped - 8) * scale.float()[..., None]).flatten(1)
        return (grouped * scale.float()[..., None] + minimum.float()[..., None]).flatten(1)

    def _at(self, which: slice | int) -> Codes:
        scale, minimum = (None if t is None else t[which] for t in (self.scale, self.minimum))
        return replace(self, codes=self.codes[which], scale=scale, minimum=minimum)

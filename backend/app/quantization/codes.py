"""规范的码：矩阵怎样存成 16、8 或 4 位，又怎样还原成浮点。内核怎么打包是它们自己的事，从不存盘。

O 输出数、I 输入宽、G = I / group、E 专家数（专家的矩阵叠成 (E, O, I)，下面的形状前面都多一维）。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# int8 对称，-128 不用；4 位对称时 8 是零点。
MAX_INT8, ZERO_INT4, MAX_INT4 = 127, 8, 15


@dataclass(frozen=True)
class Scheme:
    """一个矩阵怎样存。

    Attributes:
        bits: 16（float16）、8（每行一个尺度）或 4（每行每 group 列一个尺度）。
        group: 4 位的组宽；别的位数没有组。
        asymmetric: 4 位的组另存一个最小值。
    """

    bits: int
    group: int = 0
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (16, 8, 4):
            raise ValueError(f"bits={self.bits!r} must be 16, 8 or 4")
        if type(self.group) is not int or type(self.asymmetric) is not bool:
            raise ValueError(
                f"group={self.group!r} must be a number and asymmetric={self.asymmetric!r} a bool"
            )
        if self.bits != 4 and (self.group or self.asymmetric):
            raise ValueError(
                f"group={self.group}, asymmetric={self.asymmetric} are for bits=4, "
                f"not bits={self.bits}: leave them out"
            )
        if self.bits == 4 and (self.group < 2 or self.group % 2):
            raise ValueError(f"group={self.group} must be even and at least 2: use 32")

    def check_width(self, width: int, name: str) -> None:
        """
        Raises:
            ValueError: 组不整除这个矩阵的宽；点名可用的组宽。
        """
        if self.bits == 4 and width % self.group:
            fits = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
            use = f"use a group of {' or '.join(map(str, fits))}" if fits else "use 8 bits for it"
            raise ValueError(
                f"group={self.group} does not divide the width {width} of {name}: {use}"
            )

    def label(self) -> str:
        if self.bits == 16:
            return "fp16"
        kind = " asymmetric" if self.asymmetric else ""
        return "int8" if self.bits == 8 else f"int4 g{self.group}{kind}"

    def stored(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(..., O, I) 的矩阵存成哪几个张量：{字段: (类型, 形状)}。"""
        *front, width = shape
        if self.bits == 16:
            return {"codes": (torch.float16, shape)}
        if self.bits == 8:
            return {"codes": (torch.int8, shape), "scale": (torch.float16, (*front, 1))}
        groups = (torch.float16, (*front, width // self.group))
        found = {"codes": (torch.uint8, (*front, width // 2)), "scale": groups}
        return found | ({"minimum": groups} if self.asymmetric else {})

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(
            torch.Size(each).numel() * dtype.itemsize for dtype, each in self.stored(shape).values()
        )


@dataclass(frozen=True)
class Codes:
    """一个矩阵（或叠起来的 E 个）。

    Attributes:
        bits: 16、8 或 4。
        codes: 16：(O, I) float16；8：(O, I) int8；4：(O, I/2) uint8，低四位是偶数列。
        scale: 8：(O, 1)；4：(O, G)；float16，大于零，至多 8 个有效位，所以 bfloat16 里也一样准
            （GGUF 与 bf16 的内核因此得到同样的权重）。16 位没有。
        minimum: 非对称的 4 位才有，(O, G)：值 = 码·scale + minimum。对称时值 = (码 - 8)·scale。
        group: 4 位时几列共用一个尺度。
    """

    bits: int
    codes: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None
    group: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        *front, columns = self.codes.shape
        return (*front, columns * (2 if self.bits == 4 else 1))

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group, self.minimum is not None)

    def __getitem__(self, expert: int) -> Codes:
        """叠起来的里面的一个；不复制。"""
        scale, minimum = (None if t is None else t[expert] for t in (self.scale, self.minimum))
        return Codes(self.bits, self.codes[expert], scale, minimum, self.group)

    def outputs(self, rows: slice) -> Codes:
        """几行输出；不复制。"""
        scale, minimum = (None if t is None else t[rows] for t in (self.scale, self.minimum))
        return Codes(self.bits, self.codes[rows], scale, minimum, self.group)

    def tensors(self) -> dict[str, Tensor]:
        """有的那几个张量，按存盘的名字。"""
        found = {"codes": self.codes, "scale": self.scale, "minimum": self.minimum}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dequantize(self) -> Tensor:
        """(..., O, I) float32。"""
        return self._floats(self.codes, self.scale, self.minimum)

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., I) float32：查表，只还原查到的行。"""
        flat = ids.reshape(-1)
        scale, minimum = (None if t is None else t[flat] for t in (self.scale, self.minimum))
        return self._floats(self.codes[flat], scale, minimum).view(*ids.shape, -1)

    def _floats(self, codes: Tensor, scale: Tensor | None, minimum: Tensor | None) -> Tensor:
        if scale is None:
            return codes.float()
        if self.bits == 8:
            return codes.float() * scale.float()
        grouped = unpack(codes).float().unflatten(-1, (-1, self.group))
        if minimum is None:
            return ((grouped - ZERO_INT4) * scale.float()[..., None]).flatten(-2)
        return (grouped * scale.float()[..., None] + minimum.float()[..., None]).flatten(-2)

    def check(self, name: str) -> None:
        """值的检查；类型与形状在读之前就照文件头核对过。

        Raises:
            ValueError: 码越界，尺度不是大于零的有限数，或有 NaN、无穷；点名 name。
        """
        if self.bits == 16:
            _check_finite(self.codes, f"{name}.codes")
        if self.bits == 8 and bool((self.codes == -MAX_INT8 - 1).any()):
            raise ValueError(
                f"{name}.codes holds -128, outside -{MAX_INT8}..{MAX_INT8}: the file is damaged"
            )
        if self.minimum is not None:
            _check_finite(self.minimum, f"{name}.minimum")
        if self.scale is not None:
            _check_finite(self.scale, f"{name}.scale")
            if not bool((self.scale > 0).all()):
                raise ValueError(f"{name}.scale is zero or negative: the file is damaged")


def pack(nibbles: Tensor) -> Tensor:
    """(..., I) 0..15 -> (..., I/2) uint8，低四位是偶数列。"""
    pairs = nibbles.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(codes: Tensor) -> Tensor:
    """pack 的反面。"""
    return torch.stack((codes & MAX_INT4, codes >> 4), -1).flatten(-2)


def _check_finite(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity: the file is damaged")

"""一个量化的矩阵：规范的码是缓冲区，备好的乘法第一次用时才有，从不存盘。

O 输出数、I 输入宽、E 专家数。
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import Codes
from .kernels import prepare
from .products import Product

COMPUTED = torch.float32


class _Stored(nn.Module):
    """规范的码与尺度；码一变（装载、换设备），备好的乘法就作废。"""

    codes: Tensor
    scale: Tensor | None
    minimum: Tensor | None

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.bits, self.group = codes.bits, codes.group
        self.register_buffer("codes", codes.codes)
        self.register_buffer("scale", codes.scale)
        self.register_buffer("minimum", codes.minimum)
        self._products: dict[int, Product] = {}

    @property
    def dtype(self) -> torch.dtype:
        """激活与结果的精度，不是存储的：缓存与嵌入照它建。"""
        return COMPUTED

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def _codes(self) -> Codes:
        return Codes(self.bits, self.codes, self.scale, self.minimum, self.group)

    def _multiply(self, at: int, codes: Codes, x: Tensor, bias: Tensor | None) -> Tensor:
        """(R, I) -> (R, O)；at：备好的乘法在哪一格。"""
        _check(x, codes)
        if torch.compiler.is_compiling():
            return F.linear(x, codes.dequantize(), bias)
        product = self._products.get(at)
        if product is None:
            product = self._products[at] = prepare(codes)
        return product(x, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> _Stored:
        probe = torch.zeros((), dtype=torch.float16)
        if (got := fn(probe).dtype) != probe.dtype:
            raise ValueError(
                f"cannot cast {self.bits}-bit weights to {got}: they multiply {COMPUTED} "
                "activations; move them with .to(device), or cast the float model and quantize it"
            )
        self._products = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._products = {}
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """复制与跨进程时不带备好的乘法：里面有指针。"""
        return {**self.__dict__, "_products": {}}


class QuantizedMatrix(_Stored):
    """(O, I)：乘法、查表、还原。查表与输出头可以是同一个。"""

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._codes().shape)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., I) float32 -> (..., O)。

        Raises:
            ValueError: x 要梯度、不是 float32、宽度不对，或在 autocast 里。
        """
        y = self._multiply(0, self._codes(), x.reshape(-1, x.shape[-1]), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., I) float32。"""
        return self._codes().rows(ids)

    def dequantize(self) -> Tensor:
        """(O, I) float32。"""
        return self._codes().dequantize()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={tuple(self.shape)}, group={self.group}"


class QuantizedExperts(_Stored):
    """E 个矩阵叠在一起：codes (E, O, ·)，scale、minimum (E, O, G)。"""

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def shape(self) -> torch.Size:
        """(E, O, I)。"""
        return torch.Size((len(self), *self._codes().expert(0).shape))

    def product(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """这个专家的 (R, I) -> (R, O)；没有行的专家不备、也不读。"""
        return self._multiply(expert, self._codes().expert(expert), x, bias)

    def dequantize(self) -> Tensor:
        """(E, O, I) float32。"""
        each = self._codes()
        return torch.stack([each.expert(e).dequantize() for e in range(len(self))])


def _check(x: Tensor, codes: Codes) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"{codes.bits}-bit weights have no gradient, and x requires one: run under "
            "torch.no_grad(), or train the float model and quantize it again"
        )
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{codes.bits}-bit weights multiply {COMPUTED} activations, not "
            f"{torch.get_autocast_dtype(x.device.type)}: leave autocast off"
        )
    if x.dtype != COMPUTED:
        raise ValueError(
            f"{codes.bits}-bit weights multiply {COMPUTED} activations, got {x.dtype}: "
            "pass x.float()"
        )
    if x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"x has width {x.shape[-1]}, the {codes.bits}-bit weights {codes.shape[1]}: "
            "they must be equal"
        )

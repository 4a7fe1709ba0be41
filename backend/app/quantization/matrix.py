"""一个量化的矩阵：规范的码是缓冲区，备好的乘法第一次用时才有，从不存盘。

O 输出数、I 输入宽、E 专家数。
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.native.structs import Held

from .codes import Codes
from .kernels import Case, choose_kernel, prepare
from .products import Product, native, native_weight

COMPUTED = torch.float32


class _Stored(nn.Module):
    """规范的码与尺度；码一变（装载、换设备），备好的乘法就作废。"""

    codes: Tensor
    scale: Tensor | None
    minimum: Tensor | None

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.bits, self.group, self.width = codes.bits, codes.group, codes.shape[-1]
        self.register_buffer("codes", codes.codes)
        self.register_buffer("scale", codes.scale)
        self.register_buffer("minimum", codes.minimum)
        self._products: dict[int | None, Product] = {}

    @property
    def dtype(self) -> torch.dtype:
        """激活与结果的精度，不是存储的：缓存与嵌入照它建。"""
        return COMPUTED

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def shape(self) -> torch.Size:
        """(O, I)；叠着的 (E, O, I)。"""
        return torch.Size(self._codes().shape)

    def dequantize(self) -> Tensor:
        """(..., O, I) float32。"""
        return self._codes().dequantize()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={tuple(self.shape)}, group={self.group}"

    def _codes(self) -> Codes:
        return Codes(self.bits, self.codes, self.scale, self.minimum, self.group)

    def _multiply(self, expert: int | None, x: Tensor, bias: Tensor | None) -> Tensor:
        """(R, I) -> (R, O)；expert：叠着的里面哪一个。"""
        _check(x, self.bits, self.width)
        compiling = torch.compiler.is_compiling()
        product = None if compiling else self._products.get(expert)
        if product is None:
            codes = self._codes() if expert is None else self._codes()[expert]
            if compiling:
                return F.linear(x, codes.dequantize(), bias)
            product = self._products[expert] = prepare(codes)
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

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., I) float32 -> (..., O)。

        Raises:
            ValueError: x 要梯度、不是 float32、宽度不对，或在 autocast 里。
        """
        y = self._multiply(None, x.reshape(-1, x.shape[-1]), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def native_weight(self) -> Held | None:
        """原生的文件直接读的形式（NativeSource）；选中的是别的内核时没有。"""
        codes = self._codes()
        return (
            native_weight(codes) if choose_kernel(Case.of(codes)).kernel.prepare is native else None
        )

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., I) float32。"""
        return self._codes().rows(ids)


class QuantizedStack(_Stored):
    """E 个矩阵叠在一起：codes (E, O, ·)，scale、minimum (E, O, G)。"""

    def product(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """这个专家的 (R, I) -> (R, O)；没有行的专家不备、也不读。"""
        return self._multiply(expert, x, bias)


def _check(x: Tensor, bits: int, width: int) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"{bits}-bit weights have no gradient, and x requires one: run under "
            "torch.no_grad(), or train the float model and quantize it again"
        )
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        raise ValueError(
            f"{bits}-bit weights multiply {COMPUTED} activations, not "
            f"{torch.get_autocast_dtype(kind)}: leave autocast off"
        )
    if x.dtype != COMPUTED:
        raise ValueError(
            f"{bits}-bit weights multiply {COMPUTED} activations, got {x.dtype}: pass x.float()"
        )
    if x.shape[-1] != width:
        raise ValueError(
            f"x has width {x.shape[-1]}, the {bits}-bit weights {width}: they must be equal"
        )

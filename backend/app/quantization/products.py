"""各内核：由规范的码备好一个乘法 y = x·Wᵀ + b。备好的形式不存盘，换了机器就另备。

R 行数、O 输出数、I 输入宽、G 组数。x (R, I) float32、bias (O,) -> y (R, O) float32。
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from app.native.build import load_native
from app.native.structs import FP16, INT4, INT8, Held, hold, pointer

from .codes import ZERO_INT4, Codes, unpack

Product = Callable[[Tensor, Tensor | None], Tensor]

# 还原成浮点的临时一块，元素数：够大使乘法吃满，又只占整个矩阵的一小部分。
BLOCK = 2**22
_KINDS = {16: FP16, 8: INT8, 4: INT4}
_GUARD = 8


def dequantized(codes: Codes) -> Product:
    """慢的孪生：一块一块还原成浮点再乘，任何设备、任何精度的 x。"""

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [F.linear(x, piece.dequantize().to(x.dtype)) for piece in _pieces(codes)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias

    return product


def native_weight(codes: Codes) -> Held:
    """规范的码，原生的文件直接读，不另存一份。"""
    offset, scale = None, codes.scale
    if codes.bits == 8:
        assert scale is not None
        scale = scale.float().contiguous()
    elif codes.minimum is not None and scale is not None:
        offset = codes.minimum.float() + ZERO_INT4 * scale.float()
    outs, width = codes.shape
    return hold(_KINDS[codes.bits], (outs, width), codes.group, codes.codes, scale, offset)


def native(codes: Codes) -> Product:
    """原生的文件。

    Raises:
        MemoryError: 取整后的 x 放不下。
    """
    handle, held = load_native().handle, native_weight(codes)
    assert handle is not None
    (outs, width), call = codes.shape, handle.gpt2_product

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], outs)
        failed = call(
            held.address, x.data_ptr(), x.shape[0], pointer(bias), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to round {x.shape[0]} rows of width {width}")
        return y

    return product


def widened(codes: Codes) -> Product:
    """fbgemm 的半精度权重：码还原成 16 位；float32 的激活。"""
    packed = [
        torch.ops.quantized.linear_prepack_fp16(piece.dequantize(), None)
        for piece in _pieces(codes)
    ]

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [torch.ops.quantized.linear_dynamic_fp16(x, one) for one in packed]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias

    return product


def guarded(codes: Codes) -> Product:
    """torch 的 int8 乘法，激活按行取整成 8 位。

    算子只给整个输入一个尺度：一行大 20 倍的邻居会毁掉别的行。所以每行先除以自己的最大值，
    再添几列固定的 1 与 -1（权重里是 0），尺度就总是一样的，各行互不相干。
    """
    assert codes.scale is not None
    zeros = codes.codes.new_zeros(codes.shape[0], _GUARD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(
            torch.cat((codes.codes, zeros), 1),
            codes.scale.double().flatten(),
            torch.zeros(codes.shape[0], dtype=torch.int64),
            0,
        )
        packed = torch.ops.quantized.linear_prepack(weight, None)
    guard = torch.zeros(1, _GUARD)
    guard[0, :2] = torch.tensor((1.0, -1.0))

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        most = x.abs().amax(1, keepdim=True)
        scaled = torch.cat((x / most.clamp(min=1e-30), guard.expand(x.shape[0], -1)), 1)
        y = torch.ops.quantized.linear_dynamic(scaled.nan_to_num(), packed, False) * most
        return y if bias is None else y + bias

    return product


def packed_int4(codes: Codes) -> Product:
    """torch 的 int4 权重；激活与结果在里面是 bfloat16，尺度也是。"""
    assert codes.scale is not None
    packed = torch._convert_weight_to_int4pack_for_cpu(unpack(codes.codes).int(), 1)
    scale, zero = codes.scale.float(), torch.zeros_like(codes.scale, dtype=torch.float32)
    if codes.minimum is not None:
        zero = codes.minimum.float() + ZERO_INT4 * scale
    both = torch.stack((scale, zero), -1).bfloat16().transpose(0, 1).contiguous()

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, codes.group, both).float()
        return y if bias is None else y + bias

    return product


def _pieces(codes: Codes) -> list[Codes]:
    """按输出切开：还原时只有一块是浮点的。"""
    outs, width = codes.shape
    step = max(1, BLOCK // width)
    return [codes.outputs(slice(at, at + step)) for at in range(0, outs, step)]

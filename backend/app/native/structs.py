"""native.h 与 step.h 的结构，按同样的次序；指针指着的张量由 Held 留住。"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

FLOAT32, FP16, INT8, INT4 = range(4)
_int, _pointer = ctypes.c_int64, ctypes.c_void_p


class Weight(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("kind", "outs", "width", "group")),
        *((name, _pointer) for name in ("codes", "scale", "offset")),
    )


class Norm(ctypes.Structure):
    _fields_ = (
        ("gain", _pointer), ("shift", _pointer), ("eps", ctypes.c_double), ("centered", _int),
    )  # fmt: skip


class Matrix(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("attn_inner", "attn_outer", "mlp_inner", "mlp_outer")),
        *((name, Norm) for name in ("query", "key")),
        *((name, Matrix) for name in ("qkv", "proj", "up", "down")),
        ("attn_alpha", ctypes.c_double), ("mlp_alpha", ctypes.c_double),
        ("keys", _pointer), ("values", _pointer), ("row_stride", _int), ("head_stride", _int),
    )  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden")),
        *((name, _int) for name in ("activation", "gated", "side")),
        ("final", Norm), ("head", Matrix), ("layer", ctypes.POINTER(Layer)),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Held:
    """一个 Weight，与它指着的张量。"""

    weight: Weight
    tensors: tuple[Tensor | None, ...]

    @property
    def address(self) -> int:
        return ctypes.addressof(self.weight)


@runtime_checkable
class NativeSource(Protocol):
    """不是张量的权重（码），原生的文件也能直接读。"""

    def native_weight(self) -> Held | None:
        """None = 这台机器不用原生的内核乘它。"""


def hold(kind: int, shape: tuple[int, int], group: int, *tensors: Tensor | None) -> Held:
    """tensors：codes、scale、offset。detach 之后与原来的共用内存，原来的参数被换掉也还在。"""
    kept = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    return Held(Weight(kind, *shape, group, *map(pointer, kept)), kept)


def float_weight(weight: Tensor) -> Held:
    """(O, I) float32。"""
    assert weight.dtype == torch.float32
    outs, width = weight.shape
    return hold(FLOAT32, (outs, width), 0, weight, None, None)


def pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()

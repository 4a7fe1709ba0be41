"""数组怎样写进 JSON：{dtype, shape, data: base64 小端}，比一个个数字小四倍，也不损失一位。"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from app.serving.api.errors import wrong

# 浏览器一口气解得开、又不占住别人的网线。
MOST_BYTES = 5 * 1024 * 1024
_NAMES = {"uint8": "u8", "uint16": "u16", "uint32": "u32", "float32": "f32"}


def pack(values: Any, kind: str) -> dict[str, Any]:
    """kind: numpy 的类型名。整数放不下就是错，绝不绕回去。"""
    array = np.asarray(values)
    packed = np.ascontiguousarray(array.astype(np.dtype(kind).newbyteorder("<")))
    if array.dtype.kind in "iu" and not np.array_equal(packed, array):
        raise OverflowError(f"values up to {array.max()} do not fit {kind}")
    data = base64.b64encode(packed.tobytes()).decode("ascii")
    return {"dtype": _NAMES[kind], "shape": list(packed.shape), "data": data}


def packed_bytes(count: int, each: int) -> int:
    """count 个数、每个 each 字节，写成 base64 是多少字节。"""
    return -(-count * each // 3) * 4


def check_size(parts: Mapping[str, int], total: int | None = None) -> None:
    """parts: 字段 -> 它使回答多出几字节（估计）；total: 写好的回答有几字节，None = 还没有写。

    Raises:
        ApiError: 400，太大；点出最大的那个字段。
    """
    total = sum(parts.values()) if total is None else total
    if total > MOST_BYTES:
        name = max(parts, key=lambda part: parts[part])
        raise wrong(
            name,
            f"the answer would have {total} bytes, more than {MOST_BYTES}, most of them for "
            f"{name} ({parts[name]}): ask for fewer layers, a shorter prompt, or in several calls",
            "answer_too_large",
        )

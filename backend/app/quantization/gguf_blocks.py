"""我们的码排成 GGUF 的块：同样的码、同样的尺度，一位不改，从不重新量化。

Q8_0 是 32 个 int8 与一个 float16 的尺度；Q4_0、Q4_1 是 32 个四位码，低四位是前 16 个，
高四位是后 16 个（我们的低四位是偶数列），前面是尺度，Q4_1 还有最小值。
O 输出数、I 输入宽、G 块数。
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .codes import Codes, unpack

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLOCK = 32


def block_type(codes: Codes) -> str:
    """装得下这些码的 GGUF 类型；没有的（组窄于一块、宽不是块的倍数）写成 float32，值不变。"""
    if codes.bits == 16:
        return "F16"
    if codes.shape[-1] % BLOCK or codes.group % BLOCK:
        return "F32"
    if codes.bits == 8:
        return "Q8_0"
    return "Q4_0" if codes.minimum is None else "Q4_1"


def blocks(codes: Codes) -> np.ndarray[Any, Any]:
    """(O, I) 的码 -> (O, 字节数) uint8；F16 与 F32 是 (O, I) 的数。"""
    import numpy as np

    kind = block_type(codes)
    if kind == "F16":
        return codes.codes.numpy()
    if kind == "F32":
        return codes.dequantize().numpy()
    outs, width = codes.shape
    count = width // BLOCK
    assert codes.scale is not None
    parts = [_halves(codes.scale, count)]
    if codes.bits == 8:
        parts.append(codes.codes.numpy().view(np.uint8).reshape(outs, count, BLOCK))
    else:
        if codes.minimum is not None:
            parts.append(_halves(codes.minimum, count))
        nibbles = unpack(codes.codes).numpy().reshape(outs, count, 2, BLOCK // 2)
        parts.append(nibbles[:, :, 0] | (nibbles[:, :, 1] << 4))
    return np.concatenate(parts, -1).reshape(outs, -1)


def _halves(values: Tensor, count: int) -> np.ndarray[Any, Any]:
    """(O, G) 或 (O, 1) float16 -> (O, count, 2) 字节：一组盖住几块，就重复几次。"""
    import numpy as np

    repeated = values.repeat_interleave(count // values.shape[1], 1)
    return repeated.contiguous().numpy().view(np.uint8).reshape(values.shape[0], count, 2)

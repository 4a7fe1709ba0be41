"""safetensors 文件：先只看头、核对布局，再逐个张量读。

自己读而不用库：库在任何核对之前就照头行事（一百万个空张量要一分钟、重复的键取最后一个），
而逐个读使内存里至多比模型多出一个张量，不会有第二份模型。写文件仍用库。
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # 只会是要忽略的缓冲区（GPT-2 旧文件里的掩码）。
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I64": torch.int64,
}
# 一个条目约 110 字节；XL 有 580 个张量、头约 60 KB。解析后的字典比文本大十倍，所以要有上限。
_BYTES_PER_TENSOR = 256
_MIN_HEADER_LIMIT = 1 << 20


def write_tensors_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """写一个 safetensors 文件，权限照 umask：库总写成只有主人可读，容器与别的用户就打不开。

    Raises:
        OSError: 写不下。
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # 盘满时它抛的不是 OSError：谁也不会去接，而这正是要接的。
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)


class TensorSource(Protocol):
    """一套权重：形状在读之前就知道。"""

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """读出一个，调用者独有。"""


def header_limit(tensors: int) -> int:
    """预期有这么多张量的文件，头至多多少字节。"""
    return max(_MIN_HEADER_LIMIT, tensors * _BYTES_PER_TENSOR)


class SafetensorsFiles:
    """一个或几个分片。打开时读头并核对；张量在 read 时才读。

    Raises:
        ValueError: 头有错，或同一个名字在两个分片里。
    """

    def __init__(self, paths: list[Path], limit: int = _MIN_HEADER_LIMIT) -> None:
        self.where = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, int, torch.dtype]] = {}
        for path in paths:
            header, start = _open(path, limit)
            for name, entry in header.items():
                if name in self._places:
                    raise ValueError(f"{path}: tensor {name!r} is in another shard too")
                self.shapes[name] = tuple(entry["shape"])
                offset = start + entry["data_offsets"][0]
                self._places[name] = path, offset, DTYPES[entry["dtype"]]

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name][2]

    def read(self, name: str) -> Tensor:
        """
        Raises:
            ValueError: 文件变短了，不是浮点数，或有 NaN、无穷。
        """
        path, _, dtype = self._places[name]
        if not dtype.is_floating_point:
            raise ValueError(f"{path}: tensor {name!r} holds {dtype}, expected floating point")
        tensor = self.read_raw(name)
        check_finite(tensor, name, str(path))
        return tensor

    def read_raw(self, name: str) -> Tensor:
        """任何类型，值不检查：量化的码。

        Raises:
            ValueError: 文件变短了。
        """
        return self._read(name, 0, self.shapes[name])

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """第 [begin, end) 行，值不检查；标量算一行。

        Raises:
            ValueError: 文件变短了。
        """
        shape = self.shapes[name] or (1,)
        return self._read(name, begin * math.prod(shape[1:]), (end - begin, *shape[1:]))

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> Tensor:
        """从第 first 个元素起的一段。"""
        path, offset, dtype = self._places[name]
        data = bytearray(math.prod(shape) * dtype.itemsize)
        with path.open("rb") as file:
            file.seek(offset + first * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise ValueError(f"{path}: ends inside tensor {name!r}: the file was cut")
        # clone：bytearray 没有按缓存行对齐，留着它以后每次矩阵乘都慢。
        return torch.frombuffer(data, dtype=dtype).view(shape).clone()


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: tensor {name!r} holds NaN or infinity: the weights are broken")


def _open(path: Path, limit: int) -> tuple[dict[str, Any], int]:
    """({名字: {dtype, shape, data_offsets}}, 数据从文件的哪里开始)，已核对布局。

    8 字节小端长度，然后是 JSON；长度不可信，先设上限再读。

    Raises:
        ValueError: 头太长、不是 JSON、有重复的键，或描述的不是这个文件。
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(size - 8, limit):
            raise ValueError(
                f"{path}: a header of {length} bytes in a file of {size} bytes (limit {limit}): "
                "the file is truncated or no safetensors file"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is broken: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a mapping")
    header.pop("__metadata__", None)
    end = check_layout(header, path)
    if 8 + length + end != size:
        raise ValueError(f"{path}: has {size} bytes but its header describes {8 + length + end}")
    return header, 8 + length


def check_layout(header: dict[str, Any], path: Path) -> int:
    """各张量首尾相接、不重叠、大小与形状相符；返回数据的总字节数。"""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            ok = type(shape) is list and all(
                type(n) is int and n >= 0 for n in (*shape, begin, end)
            )
            ok = ok and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            raise ValueError(f"{path}: the header entry of tensor {name!r} is not valid")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: tensor {name!r} starts at {begin}, expected {position}")
        position = end
    return position


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result

"""键或值的存储：一层一个。浮点原样存；int8 每个词元、每个头一个尺度。

B 行、G 键值头数、S 槽数、D 头宽、T 本次词元数。最后一槽（第 S 槽）是填充的去处，永不被读。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """步调一致的各行写到哪里：几段 (槽, 列)，写是切片；列为 None = 全部的列。"""

    spans: tuple[tuple[slice, slice | None], ...]

    def put(self, part: Tensor, x: Tensor) -> None:
        for slots, columns in self.spans:
            # 单步解码时每多一次切片都量得出来。
            part[:, :, slots] = x if columns is None else x[:, :, columns]


@dataclass(frozen=True)
class Scatter:
    """步调不一的各行写到哪里：rows (B, 1) 行号，slots (B, T) 槽号。"""

    rows: Tensor
    slots: Tensor

    def put(self, part: Tensor, x: Tensor) -> None:
        part[self.rows, :, self.slots] = x.transpose(1, 2)


@dataclass(frozen=True)
class At:
    """步调一致的各行各写一个词元，槽号 (1,) 在设备上：录进 CUDA 图的一步不能有 Python 的数。"""

    slot: Tensor

    def put(self, part: Tensor, x: Tensor) -> None:
        part.index_copy_(2, self.slot, x)


class Store:
    """浮点存储，也是各种存储的共同部分。

    Attributes:
        parts: 全部张量，各 (B, G, S+1, ·)；没有写过的槽里是任意的数。
        dtype: 读出来的精度。
    """

    # 每个词元每个头的张量：(宽度, 精度)；None = 与头宽、读出的精度相同。
    layout: ClassVar[tuple[tuple[int | None, torch.dtype | None], ...]] = ((None, None),)

    def __init__(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype

    @classmethod
    def allocate(
        cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> Store:
        """shape = (B, G, S+1, D)。不清零：一开始就清零整个缓存是白写几百 MB。"""
        *outer, width = shape
        return cls(
            tuple(
                torch.empty((*outer, w or width), dtype=d or dtype, device=device)
                for w, d in cls.layout
            ),
            dtype,
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def write(self, where: Runs | Scatter | At, x: Tensor) -> None:
        """x (B, G, T, D)。"""
        where.put(self.parts[0], x)

    def read(self, slots: slice) -> Tensor:
        """(B, G, 槽数, D)；浮点存储给的是视图，不搬数据。"""
        return self.parts[0][:, :, slots]

    def move(self, source: Tensor, target: slice) -> None:
        """把 source (B|1, n) 这些槽搬到 target 这 n 个槽，原样，不经过解码。"""
        index = source[:, None, :, None]
        for part in self.parts:
            shape = (part.shape[0], part.shape[1], -1, part.shape[3])
            part[:, :, target] = part.gather(2, index.expand(shape))

    def clear(self, low: int, high: int) -> None:
        for part in self.parts:
            part[:, :, low:high] = 0

    def rows(self, rows: Tensor, used: int) -> Store:
        """换行。只搬前 used 个槽：长缓存里搬空槽是白费带宽。"""
        parts = []
        for part in self.parts:
            new = part.new_empty((rows.numel(), *part.shape[1:]))
            new[:, :, :used] = part[:, :, :used][rows]
            parts.append(new)
        return type(self)(tuple(parts), self.dtype)

    def view(self, rows: slice) -> Store:
        """只看这几行：同一块内存。"""
        return type(self)(tuple(part[rows] for part in self.parts), self.dtype)

    def copy(self, source: int, target: int, used: int) -> None:
        """第 target 行的前 used 个槽换成第 source 行的，原样，不经过解码。"""
        for part in self.parts:
            part[target, :, :used] = part[source, :, :used]

    def clone(self) -> Store:
        return type(self)(tuple(part.clone() for part in self.parts), self.dtype)


class Int8Store(Store):
    """对称 absmax：尺度 = max|x| / 127，误差不超过尺度的一半（Dettmers et al. 2022, 第 2 节）。

    按词元、按头取尺度：一个离群的词元不会毁掉别的词元，写入时也不必改写旧的。
    """

    layout = ((None, torch.int8), (1, torch.float32))

    def write(self, where: Runs | Scatter | At, x: Tensor) -> None:
        x = x.float()
        # 全零的向量：尺度取最小的正数，商为零。
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(x.dtype).tiny)
        where.put(self.parts[0], (x / scale).round().to(torch.int8))
        where.put(self.parts[1], scale)

    def read(self, slots: slice) -> Tensor:
        data, scale = self.parts
        # 就地乘：混着精度相乘、再分配一次都慢得多。
        return data[:, :, slots].float().mul_(scale[:, :, slots]).to(self.dtype)

"""检查点里每个权重是一个整个的张量，写时流过 rank 0，读时各取所需：谁也不必放下整个模型。

文件与一个进程写的逐字节相同（safetensors，同样的次序与头），所以 rank 数不同的训练互相读得懂，
sha256 也可以比。每次只过 CHUNK 字节。rank 0 写不下去（盘满）时照样收完，再由调用者告诉大家
（comm.py 的 first）：别的 rank 不会空等。
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from app.models.transformer.weights.safetensors_file import DTYPES, SafetensorsFiles

from ..comm import Ranks
from .pieces import Box, Part, inside

CHUNK = 4 << 20
Table = Mapping[str, Part]
# safetensors 的次序：对齐要求大的在前，同类的按名字。
_ORDER = ("I64", "F64", "F32", "BF16", "F16", "I8", "U8", "BOOL")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stream:
    """几张表（每个文件一张）从各 rank 流向 rank 0。

    各 rank 以同样的名字造它；rank 0 调 write，其余 serve，直到 rank 0 close。rank 0 中途出错也须
    close，否则别人等到超时。

    Args:
        tables: {文件: {张量名: 我的那一份}}，各 rank 的名字与整个的形状相同。
    """

    def __init__(self, tables: Mapping[str, Table], ranks: Ranks) -> None:
        self._tables, self._ranks = tables, ranks
        mine = {
            file: {name: part.boxes for name, part in table.items()}
            for file, table in tables.items()
        }
        self._boxes = ranks.collect(mine)

    @property
    def files(self) -> list[str]:
        return list(self._tables)

    def write(self, file: str, path: Path) -> str:
        """rank 0：写一个文件，返回它的 sha256。

        Raises:
            OSError: 写不下；别的 rank 送来的已收完。
        """
        self._ranks.agree(file)
        digest = hashlib.sha256()
        with _Guarded(path) as out:
            for data in self._bytes(file, self._tables[file]):
                digest.update(data)
                out.write(data)
        return digest.hexdigest()

    def serve(self) -> None:
        """其余的 rank：rank 0 要哪个文件就送哪个，直到它说完了。"""
        while (file := self._ranks.agree(None)) is not None:
            table = self._tables[file]
            for name, begin, end in _chunks(table):
                for box, low, high in inside(table[name].boxes, begin, end):
                    self._ranks.send(table[name].view(box, low, high), 0)

    def close(self) -> None:
        """rank 0：说完了。"""
        self._ranks.agree(None)

    def _bytes(self, file: str, table: Table) -> Iterator[bytes | memoryview]:
        yield header(table)
        for name, begin, end in _chunks(table):
            owners = [boxes[file][name] for boxes in self._boxes]
            yield _raw(self._chunk(table[name], owners, begin, end))

    def _chunk(self, part: Part, owners: list[tuple[Box, ...]], begin: int, end: int) -> Tensor:
        """整个张量的第 [begin, end) 行，由各 rank 的块拼成。"""
        whole = torch.empty((end - begin, *part.shape[1:]), dtype=part.dtype)
        for rank, boxes in enumerate(owners):
            for box, low, high in inside(boxes, begin, end):
                into = whole[low - begin : high - begin]
                if box.columns:
                    into = into[:, box.column : box.column + box.columns]
                if rank == self._ranks.rank:
                    into.copy_(part.view(box, low, high))
                else:
                    came = torch.empty(into.shape, dtype=part.dtype, device=part.held.device)
                    into.copy_(self._ranks.receive(came, rank))
        return whole


def read_rows(path: Path, table: Table) -> None:
    """各 rank 自己读文件里自己的行，写进手里的张量；每次至多 CHUNK 字节。

    Raises:
        ValueError: 名字、形状或类型与文件不合，或文件短了。
    """
    source = SafetensorsFiles([path])
    if missing := sorted(table.keys() - source.shapes.keys()):
        raise ValueError(f"{path} lacks {len(missing)} tensors, such as {missing[0]}")
    for name, part in table.items():
        if source.shapes[name] != part.shape or source.dtype(name) != part.dtype:
            raise ValueError(
                f"{path}: {name} is {source.dtype(name)} {source.shapes[name]} but the model has "
                f"{part.dtype} {part.shape}: the weights belong to another configuration"
            )
        for box in part.wanted:
            for begin, end in _row_ranges(part, box.row, box.row + box.rows):
                rows = source.read_rows(name, begin, end)
                if box.columns:
                    rows = rows[:, box.column : box.column + box.columns]
                part.view(box, begin, end).copy_(rows.view(part.view(box, begin, end).shape))


def header(table: Table) -> bytes:
    """safetensors 的头：8 字节小端长度，然后是补到 8 的倍数的 JSON。"""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in _sorted(table):
        part = table[name]
        end = position + math.prod(part.shape) * part.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sorted(table: Table) -> list[str]:
    return sorted(table, key=lambda name: (_ORDER.index(_NAMES[table[name].dtype]), name))


def _chunks(table: Table) -> Iterator[tuple[str, int, int]]:
    """(名字, 从第几行, 到第几行)，按文件的次序；各 rank 走的是同一串。"""
    for name in _sorted(table):
        part = table[name]
        yield from ((name, begin, end) for begin, end in _row_ranges(part, 0, part.rows))


def _row_ranges(part: Part, first: int, last: int) -> Iterator[tuple[int, int]]:
    row = max(1, math.prod(part.shape[1:]) * part.dtype.itemsize)
    step = max(1, CHUNK // row)
    yield from ((i, min(last, i + step)) for i in range(first, last, step))


def _raw(x: Tensor) -> memoryview:
    return x.reshape(-1).view(torch.uint8).numpy().data


class _Guarded:
    """写文件，第一个错误先记着：别的 rank 还在送，收完才说。"""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._failed: OSError | None = None

    def __enter__(self) -> _Guarded:
        try:
            self._file = self._path.open("wb")
        except OSError as error:
            self._failed = error
        return self

    def write(self, data: bytes | memoryview) -> None:
        if self._file is None or self._failed is not None:
            return
        try:
            self._file.write(data)
        except OSError as error:
            self._failed = error

    def __exit__(self, *_: object) -> None:
        """
        Raises:
            OSError: 写的途中，或关上时（缓冲里的写不下）出的错。
        """
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._failed = self._failed or error
        if self._failed is not None:
            raise OSError(f"{self._path} cannot be written: {self._failed}") from self._failed

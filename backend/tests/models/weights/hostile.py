"""造坏文件：safetensors 的结构攻击。每一种都从一个好的模型文件夹改出来。"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "model.safetensors"
W = "embed.wpe.weight"
OTHER = "embed.wte.weight"
Header = dict[str, Any]


def parts(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, text: bytes, body: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def edit(change: Callable[[Header], Any]) -> Callable[[Path], None]:
    def attack(path: Path) -> None:
        header, body = parts(path)
        change(header)
        put(path, json.dumps(header).encode(), body)

    return attack


def claim(length: int) -> Callable[[Path], None]:
    """头的长度说谎。"""

    def attack(path: Path) -> None:
        header, body = parts(path)
        put(path, json.dumps(header).encode(), body, length)

    return attack


def body(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def attack(path: Path) -> None:
        header, data = parts(path)
        put(path, json.dumps(header).encode(), change(data))

    return attack


def text(change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def attack(path: Path) -> None:
        header, data = parts(path)
        changed = change(json.dumps(header))
        put(path, changed if isinstance(changed, bytes) else changed.encode(), data)

    return attack


def entry(**changes: Any) -> Callable[[Path], None]:
    return edit(lambda header: header[W].update(changes))


def _sparse(size: int) -> Callable[[Path], None]:
    """size 字节的头，文件是稀疏的：不占磁盘。"""

    def attack(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", size) + b'{"__metadata__":{"a":"')
            file.truncate(8 + size)

    return attack


def _many(count: int) -> Callable[[Path], None]:
    """许多空张量：每个都合法。"""

    def attack(path: Path) -> None:
        header, data = parts(path)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = {**{f"t{i}": empty for i in range(count)}, **header}
        put(path, json.dumps(header, separators=(",", ":")).encode(), data)

    return attack


def _offsets(header: Header) -> tuple[int, int]:
    begin, end = header[W]["data_offsets"]
    return begin, end


def _moved(by_begin: int, by_end: int) -> Callable[[Path], None]:
    def change(header: Header) -> None:
        begin, end = _offsets(header)
        header[W]["data_offsets"] = [begin + by_begin, end + by_end]

    return edit(change)


def _nan(data: bytes) -> bytes:
    return struct.pack("<f", float("nan")) + data[4:]


def _infinite(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<f", float("inf"))


def _same_range(header: Header) -> None:
    header["copy"] = dict(header[W])


def _reversed(header: Header) -> None:
    begin, end = _offsets(header)
    header[W]["data_offsets"] = [end, begin]


ATTACKS: dict[str, Callable[[Path], None]] = {
    "length 2^64-1": claim(2**64 - 1),
    "length 2^63": claim(2**63),
    "length 2^40": claim(2**40),
    "length 0": claim(0),
    "length 1": claim(1),
    "length beyond the file": lambda path: put(path, b"{}", b"", 3000),
    "only a length": lambda path: path.write_bytes(struct.pack("<Q", 2)),
    "empty file": lambda path: path.write_bytes(b""),
    "overlap": _moved(-4, -4),
    "hole": edit(lambda h: h.pop(W)),
    "the same range twice": edit(_same_range),
    "trailing bytes": body(lambda data: data + b"1234"),
    "cut body": body(lambda data: data[:-4]),
    "begin after end": edit(_reversed),
    "negative offsets": entry(data_offsets=[-4, 3068]),
    "offsets beyond the file": _moved(2**40, 2**40),
    "negative shape": entry(shape=[-24, -32]),
    "shape that overflows 64 bits": entry(shape=[2**32, 2**32, 2]),
    "shape [2^63, 0]": entry(shape=[2**63, 0]),
    "shape of floats": entry(shape=[24.0, 32]),
    "shape of booleans": entry(shape=[True, 768]),
    "shape as text": entry(shape="24x32"),
    "unknown dtype": entry(dtype="F8_E9"),
    "duplicate key": text(lambda t: t[:-1] + f', "{W}": {json.dumps(json.loads(t)[W])}}}'),
    "100,000 deep": text(lambda t: '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "not UTF-8": text(lambda t: b"\xff\xfe" + t.encode()),
    "header of 101 MB": _sparse(101 << 20),
    "1,000,000 tensors": _sparse(63 << 20),
    "15,000 tensors": _many(15_000),
    "../ in a name": edit(lambda h: h.update({"../../x": h.pop(W)})),
    "NaN": body(_nan),
    "infinity": body(_infinite),
}

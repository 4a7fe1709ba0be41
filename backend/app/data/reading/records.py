"""一行或一项一条的文件：jsonl 与 json（表格见 tables.py）；整条，或取一个键的文字。

坏的一条永远是错，点名文件与行：悄悄略过会丢掉用户的文本。
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.data.reading.plain_text import BYTE_ORDER_MARK, read_text

# 一行或一项比这还长，多半不是这种文件；不设上限就会把整个文件读进内存。
MAX_LINE_BYTES = 64 * 2**20


def read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    """每行一个对象，取它的 text_key；空行略过。"""
    for where, record in jsonl_records(path):
        yield _text_of(record, text_key, where)


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(写进报错的位置, 对象)；空行与开头的字节序标记略过。

    Raises:
        ValueError: 一行太长、不是 UTF-8、不是 JSON，或不是对象；点名文件与行号。
    """
    mark = BYTE_ORDER_MARK.encode()
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{where}: longer than {MAX_LINE_BYTES} bytes: "
                    "a jsonl file has one JSON object a line"
                )
            line = line.removeprefix(mark) if number == 1 else line
            if line.strip():
                yield where, _record(line, where)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line): "
            "convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}): fix or remove the line") from None
    return _object(record, where)


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(
            f'{where}: expected an object, got {type(record).__name__}: write {{"text": ...}}'
        )
    return record


def _text_of(record: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"{where}: no key {text_key!r} (keys: {keys}): choose with --text-key")
    return checked(record[text_key], f"{where}: {text_key!r}")


def checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where} is {type(text).__name__}, expected a text: fix it or take the record out"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"{where} has a lone surrogate {code}, which UTF-8 cannot write: replace it"
        ) from None
    return text


def json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(写进报错的位置, 对象)；数组里直接写着的文字算作它的 text。"""
    for where, value in _json_values(path):
        yield where, {"text": value} if isinstance(value, str) else _object(value, where)


def read_json(path: Path, text_key: str) -> Iterator[str]:
    """一个数组，或一个接一个的对象（一行一个也在此列）；数组里的项可以直接是文字。"""
    for where, value in _json_values(path):
        if isinstance(value, str):
            yield checked(value, where)
        else:
            yield _text_of(_object(value, where), text_key, where)


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    reader = _JsonReader(path)
    array = reader.peek() == "["
    if array:
        reader.take()
    number = 0
    while reader.peek() not in ("", "]" if array else ""):
        number += 1
        yield reader.value(f"{path} item {number}")
        if array and reader.peek() not in (",", "]"):
            reader.bad(f"{path} item {number}", "no comma or ] after it")
        if array and reader.peek() == ",":
            reader.take()
            if reader.peek() in ("]", ""):
                reader.bad(f"{path} item {number}", "nothing after the comma that follows it")
    if array and reader.peek() != "]":
        reader.bad(str(path), "the array does not end")
    reader.take()
    if array and reader.peek():
        reader.bad(str(path), "text after the end of the array")


class _JsonReader:
    """一项一项地读，内存只与最长的一项有关。"""

    def __init__(self, path: Path) -> None:
        self._pieces = read_text(path)
        self._decoder = json.JSONDecoder()
        self._buffer, self._place, self._line = "", 0, 1

    def peek(self) -> str:
        """下一个非空白字符；文件到头是空串。"""
        while True:
            while self._place < len(self._buffer):
                char = self._buffer[self._place]
                if char not in " \t\r\n":
                    return char
                self.take()
            if not self._read():
                return ""

    def take(self) -> None:
        if self._place < len(self._buffer):
            self._line += self._buffer[self._place] == "\n"
            self._place += 1

    def value(self, where: str) -> tuple[str, Any]:
        where = f"{where} (line {self._line})"
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
            except RecursionError:
                self.bad(where, "nested too deep")
            except json.JSONDecodeError as error:
                if len(self._buffer) - self._place > MAX_LINE_BYTES:
                    self.bad(where, f"longer than {MAX_LINE_BYTES} characters")
                if not self._read():
                    self.bad(where, error.msg)
                continue
            # 数字可能被切在两段之间；对象与文字自带结尾
            if end == len(self._buffer) and not isinstance(value, (dict, str)) and self._read():
                continue
            self._line += self._buffer.count("\n", self._place, end)
            self._place = end
            return where, value

    def bad(self, where: str, reason: str) -> None:
        raise ValueError(f"{where}: not valid JSON ({reason}, near line {self._line}): fix it")

    def _read(self) -> bool:
        piece = next(self._pieces, None)
        self._buffer, self._place = self._buffer[self._place :] + (piece or ""), 0
        return piece is not None

"""一行或一项一篇的文件：jsonl、json、csv、tsv、parquet；各取一个键或一列的文字。

坏的一条永远是错，点名文件与行：悄悄略过会丢掉用户的文本。
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from app.data.reading.plain_text import BYTE_ORDER_MARK, read_text

# 一行或一项比这还长，多半不是这种文件；不设上限就会把整个文件读进内存。
MAX_LINE_BYTES = 64 * 2**20
_PARQUET_ROWS = 64


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
    return _checked(record[text_key], f"{where}: {text_key!r}")


def _checked(text: Any, where: str) -> str:
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


def read_json(path: Path, text_key: str) -> Iterator[str]:
    """一个数组，或一个接一个的对象（一行一个也在此列）；数组里的项可以直接是文字。"""
    for where, value in _json_values(path):
        if isinstance(value, str):
            yield _checked(value, where)
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


def read_csv(path: Path, text_key: str) -> Iterator[str]:
    """第一行是列名。逗号、分号或制表符：取列名那一行里最多的（.tsv 只认制表符）。

    Raises:
        ValueError: 没有这一列、某行的列数不同、引号没有合上；点名文件与行号。
    """
    source = _line_ends(read_text(path))
    first = next(source, "")
    tabs = path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else max(",;\t", key=first.count)
    before = csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(_again(first, source), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        if text_key not in names:
            keys = ", ".join(map(repr, names[:8])) or "none"
            raise ValueError(
                f"{path}: no column {text_key!r} in its first line (columns: {keys}): choose with "
                "--text-key, or rename it to .txt to take it as plain text"
            )
        if names.count(text_key) > 1:
            raise ValueError(
                f"{path}: {names.count(text_key)} columns are named {text_key!r}: rename one"
            )
        column = names.index(text_key)
        last = rows.line_num
        for number, row in enumerate(rows, start=1):
            where, last = f"{path} row {number} (line {last + 1})", rows.line_num
            if row and len(row) != len(names):
                raise ValueError(
                    f"{where}: {len(row)} fields, but the first line names {len(names)}: put "
                    f"fields that hold {delimiter!r} or line ends in double quotes"
                )
            if row:
                yield _checked(row[column], f"{where}: {text_key!r}")
    except csv.Error as error:
        raise ValueError(
            f"{path} line {rows.line_num}: {error}: is a double quote missing, or are the line "
            "ends not those of Unix or Windows?"
        ) from None
    finally:
        csv.field_size_limit(before)


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _line_ends(pieces: Iterator[str]) -> Iterator[str]:
    """各行，带着行尾。"""
    buffer = ""
    for piece in pieces:
        *whole, buffer = (buffer + piece).split("\n")
        for line in whole:
            yield line + "\n"
    if buffer:
        yield buffer


def read_parquet(path: Path, text_key: str) -> Iterator[str]:
    """按批读一列；需要 pyarrow。

    Raises:
        ValueError: 不是完好的 parquet、没有这一列，或某行不是文字；点名文件与行号（从 1 起）。
    """
    try:
        parquet = import_module("pyarrow.parquet")
        arrow_error = import_module("pyarrow").ArrowException
    except ImportError:
        raise ImportError(
            f"{path}: reading parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                keys = ", ".join(map(repr, names[:8]))
                raise ValueError(
                    f"{path}: no column {text_key!r} (columns: {keys}): choose with --text-key"
                )
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    row += 1
                    yield _cell(value, f"{path} row {row}: {text_key!r}")
    except (arrow_error, OSError) as error:
        at = f" after row {row}" if row else ""
        raise ValueError(
            f"{path}: not readable as parquet{at} ({error}): is the file complete?"
        ) from None


def _cell(value: Any, where: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}): write the column as text"
        ) from None
    return _checked(text, where)

"""表格文件：csv、tsv、parquet；整行，或取一列的文字。

坏的一行永远是错，点名文件与行。
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from app.data.reading.plain_text import read_text
from app.data.reading.records import MAX_LINE_BYTES, checked

_PARQUET_ROWS = 64


def read_csv(path: Path, text_key: str) -> Iterator[str]:
    for where, record in csv_records(path, text_key):
        yield checked(record[text_key], f"{where}: {text_key!r}")


def csv_records(path: Path, needed: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(写进报错的位置, {列名: 文字})，第一行是列名；needed 是非有不可的列。

    逗号、分号或制表符：取列名那一行里最多的（.tsv 只认制表符）。

    Raises:
        ValueError: 没有这一列、列名重复、某行的列数不同、引号没有合上；点名文件与行号。
    """
    source = _line_ends(read_text(path))
    first = next(source, "")
    tabs = path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else max(",;\t", key=first.count)
    before = csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(_again(first, source), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        _check_columns(names, needed, path)
        last = rows.line_num
        for number, row in enumerate(rows, start=1):
            where, last = f"{path} row {number} (line {last + 1})", rows.line_num
            if row and len(row) != len(names):
                raise ValueError(
                    f"{where}: {len(row)} fields, but the first line names {len(names)}: put "
                    f"fields that hold {delimiter!r} or line ends in double quotes"
                )
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path} line {rows.line_num}: {error}: is a double quote missing, or are the line "
            "ends not those of Unix or Windows?"
        ) from None
    finally:
        csv.field_size_limit(before)


def _check_columns(names: list[str], needed: str | None, path: Path) -> None:
    if needed is not None and needed not in names:
        keys = ", ".join(map(repr, names[:8])) or "none"
        raise ValueError(
            f"{path}: no column {needed!r} in its first line (columns: {keys}): choose with "
            "--text-key, or rename it to .txt to take it as plain text"
        )
    # 只取一列时，别的列重名不相干
    for name in names if needed is None else [needed]:
        if names.count(name) > 1:
            raise ValueError(f"{path}: {names.count(name)} columns are named {name!r}: rename one")


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
    for where, record in parquet_records(path, text_key):
        yield checked(record[text_key], f"{where}: {text_key!r}")


def parquet_records(path: Path, only: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(写进报错的位置, {列名: 值})，按批读；only：只要这一列。需要 pyarrow。

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
            if only is not None and only not in names:
                keys = ", ".join(map(repr, names[:8]))
                raise ValueError(
                    f"{path}: no column {only!r} (columns: {keys}): choose with --text-key"
                )
            columns = names if only is None else [only]
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for i in range(batch.num_rows):
                    row += 1
                    where = f"{path} row {row}"
                    yield (
                        where,
                        {
                            name: _cell(batch.column(name)[i], f"{where}: {name!r}")
                            for name in columns
                        },
                    )
    except (arrow_error, OSError) as error:
        at = f" after row {row}" if row else ""
        raise ValueError(
            f"{path}: not readable as parquet{at} ({error}): is the file complete?"
        ) from None


def _cell(value: Any, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}): write the column as text"
        ) from None

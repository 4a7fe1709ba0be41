"""文档的来源：文本文件、文件夹、jsonl、parquet，逐段读出，内存与文件大小无关。

一个文本文件是一篇文档；jsonl 的每一行、parquet 的每一行各是一篇。换行原样保留。
坏文件：直接点名给出的就拒绝，在文件夹里遇到的跳过并计数。
"""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".csv", ".html", ".jsonl", ".parquet")
_READ_BYTES = 1 << 20
# 一行比这还长，多半不是 jsonl；不设上限就会把整个文件读进内存。
MAX_LINE_BYTES = 64 * 2**20


class NotTextError(ValueError):
    """文件不是 UTF-8 文本。"""


@dataclass(frozen=True)
class Document:
    """一篇文档；pieces() 每次从头读。direct：文件是用户直接点名的，不是在文件夹里遇到的。"""

    name: str
    pieces: Callable[[], Iterator[str]]
    direct: bool


class Sources:
    """按给出的次序遍历各来源；文件夹递归，按名字排序，只取 suffixes 里的后缀。

    exclude 判断一个相对路径（posix 写法，文件或文件夹）是否略去。

    Raises:
        ValueError: 路径不存在；遍历时：文件夹里没有合用的文件、坏行、缺库。
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        suffixes: Sequence[str] = TEXT_SUFFIXES,
        text_key: str = "text",
        exclude: Callable[[str], bool] = lambda _: False,
        description: str | None = None,
    ) -> None:
        self.paths = [Path(p) for p in paths]
        if not self.paths:
            raise ValueError("no sources: give text files, folders or jsonl files")
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"{path}: there is no such file or folder")
            if not path.is_dir() and not path.is_file():
                raise ValueError(f"{path}: neither a regular file nor a folder")
        for suffix in suffixes:
            if not suffix.startswith("."):
                raise ValueError(f"suffix {suffix!r} must start with a dot: use '.{suffix}'")
        self.suffixes, self.text_key, self._exclude = tuple(suffixes), text_key, exclude
        self.description = description or ", ".join(map(str, paths))

    def documents(self) -> Iterator[Document]:
        for root in self.paths:
            if root.is_dir():
                for path in self._files(root):
                    yield from self._open(path, direct=False)
            else:
                yield from self._open(root, direct=True)

    def _files(self, root: Path) -> Iterator[Path]:
        found = False
        others: Counter[str] = Counter()
        for folder, folders, names in os.walk(root, onerror=_raise):
            inside = Path(folder).relative_to(root)
            folders[:] = sorted(n for n in folders if not self._exclude((inside / n).as_posix()))
            for name in sorted(names):
                path = Path(folder) / name
                if self._exclude((inside / name).as_posix()) or not path.is_file():
                    continue
                if path.suffix.lower() not in self.suffixes:
                    others[path.suffix.lower()] += 1
                    continue
                found = True
                yield path
        if not found:
            there = ", ".join(f"{s or '(none)'}: {n}" for s, n in others.most_common(5))
            raise ValueError(
                f"{root}: no files with the suffixes {' '.join(self.suffixes)}"
                + (f"; there are {there}: choose with --suffixes" if there else "")
            )

    def _open(self, path: Path, direct: bool) -> Iterator[Document]:
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            texts = read_jsonl(path, self.text_key)
        elif suffix == ".parquet":
            texts = read_parquet(path, self.text_key)
        else:
            yield Document(str(path), lambda: read_text(path), direct)
            return
        for number, text in enumerate(texts, start=1):
            # 坏行永远是错误：direct=True
            yield Document(f"{path}:{number}", lambda text=text: iter((text,)), True)  # type: ignore[misc]


def _raise(error: OSError) -> None:
    raise error


def read_text(path: Path) -> Iterator[str]:
    """UTF-8 文本，一段约 1 MiB；NUL 字节说明是二进制（UTF-16 也在此列）。"""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(_READ_BYTES)
            if b"\0" in block:
                _refuse(path, f"NUL byte at {done + block.index(0)}")
            try:
                piece = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # 出错的对象里含有上一段留下的半个字符
                carried = len(error.object) - len(block)
                _refuse(path, f"{error.reason} at byte {done - carried + error.start}")
            if piece:
                yield piece
            if not block:
                return
            done += len(block)


def _refuse(path: Path, reason: str) -> None:
    raise NotTextError(f"{path}: not UTF-8 text ({reason}): convert it to UTF-8 or leave it out")


def read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    """每行一个对象，取它的 text_key；空行略过。"""
    for where, record in jsonl_records(path):
        yield _text_of(record, text_key, where)


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(写进报错的位置, 对象)；空行略过。

    Raises:
        ValueError: 一行太长、不是 UTF-8、不是 JSON，或不是对象；点名文件与行号。
    """
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
            if line.strip():
                yield where, _record(line, where)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}): fix or remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    return record


def _text_of(record: dict[str, Any], text_key: str, where: str) -> str:
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"{where}: no key {text_key!r} (keys: {keys}): choose with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} is {type(text).__name__}, expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"{where}: {text_key!r} has a lone surrogate {code}") from None
    return text


def read_parquet(path: Path, text_key: str) -> Iterator[str]:
    """按批读一列；需要 pyarrow。"""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError(
            f"{path}: reading parquet needs the package pyarrow: pip install pyarrow"
        ) from None
    file = parquet.ParquetFile(path)
    if text_key not in file.schema_arrow.names:
        keys = ", ".join(map(repr, file.schema_arrow.names[:8]))
        raise ValueError(
            f"{path}: no column {text_key!r} (columns: {keys}): choose with --text-key"
        )
    for batch in file.iter_batches(batch_size=64, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}: column {text_key!r} holds {type(text).__name__}, not text"
                )
            yield text

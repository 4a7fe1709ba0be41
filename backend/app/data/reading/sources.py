"""文档的来源：文件与文件夹，逐段读出，内存与文件大小无关。

文件夹里凡是 UTF-8 文本都读，一个文件一篇；jsonl 与 parquet 一行一篇；json、csv、tsv 要先说
取哪个键，否则不碰。坏文件：直接点名的就拒绝，在文件夹里遇到的跳过。什么读了、什么没读，
inventory() 说得出来。
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from app.data.reading.inventory import Inventory, is_prepared
from app.data.reading.plain_text import PACKED_SUFFIXES, is_text, lines, read_text, split_at
from app.data.reading.records import json_records, jsonl_records, read_json, read_jsonl
from app.data.reading.tables import csv_records, parquet_records, read_csv, read_parquet

_RECORDS: dict[str, Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": jsonl_records,
    ".ndjson": jsonl_records,
    ".parquet": parquet_records,
    ".json": json_records,
    ".csv": csv_records,
    ".tsv": csv_records,
}
_READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
RECORD_SUFFIXES = tuple(_READERS)
# 文件夹里的这几种可能是数据，也可能是设置：点名取哪个键，才当作数据。
_NEED_A_KEY = (".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Reading:
    """怎样把文件读成文档。

    text_key: 记录里哪个键（或列）是文本，None = "text"；form：不取文本，取整条这种写法的记录。
    suffixes: 文件夹里只读这些后缀，空 = 凡是文本都读。
    document_per_line: 纯文本一行一篇；document_separator: 纯文本在这段文字处分篇。

    Raises:
        ValueError: 后缀不以点开头、分隔文字为空、两种分篇的办法都给了。
    """

    text_key: str | None = None
    suffixes: tuple[str, ...] = ()
    document_per_line: bool = False
    document_separator: str | None = None
    form: str | None = None

    def __post_init__(self) -> None:
        for suffix in self.suffixes:
            if not suffix.startswith("."):
                raise ValueError(f"suffix {suffix!r} must start with a dot: use '.{suffix}'")
        if self.document_separator == "":
            raise ValueError("document_separator='' is empty: give the text between documents")
        if self.document_per_line and self.document_separator is not None:
            raise ValueError(
                f"document_per_line and document_separator={self.document_separator!r} are two "
                "ways to split a file: give one of them"
            )

    @property
    def key(self) -> str:
        return "text" if self.text_key is None else self.text_key

    @property
    def what(self) -> str:
        """说给用户听的：记录里取什么。"""
        return f"text from {self.key!r}" if self.form is None else self.form

    @property
    def splits(self) -> bool:
        return self.document_per_line or self.document_separator is not None

    def takes(self, path: Path) -> bool:
        """在文件夹里遇到它时读不读。"""
        name = path.name.lower()
        if self.suffixes:
            return name.endswith(tuple(s.lower() for s in self.suffixes))
        suffix = path.suffix.lower()
        if self.form is not None:
            return suffix in _RECORDS
        if suffix in _NEED_A_KEY:
            return self.text_key is not None
        return suffix not in PACKED_SUFFIXES


@dataclass(frozen=True)
class Document:
    """一篇文档；pieces() 只读一次，在取下一篇之前。direct：坏了就是错，不可跳过。"""

    name: str
    pieces: Callable[[], Iterator[str]]
    direct: bool
    plain: bool = field(default=True)


class NothingToReadError(ValueError):
    """文件夹里没有合用的文件。"""


class Sources:
    """按给出的次序遍历各来源；文件夹递归，按名字排序。

    exclude 判断一个相对路径（posix 写法，文件或文件夹）是否略去。隐藏的文件与文件夹、链接的
    文件夹不读。

    Raises:
        ValueError: 路径不存在；遍历时：文件夹里没有合用的文件、坏行、缺库。
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        reading: Reading = Reading(),
        *,
        exclude: Callable[[str], bool] = lambda _: False,
        description: str | None = None,
    ) -> None:
        self.paths = [Path(p) for p in paths]
        if not self.paths:
            raise ValueError("no sources: give text files, folders or jsonl files")
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"{path}: there is no such file or folder")
            if is_prepared(path):
                raise ValueError(f"{path} is prepared data already: train on it, or give its text")
            if not path.is_dir() and not path.is_file():
                raise ValueError(f"{path}: neither a regular file nor a folder")
        self.reading, self._exclude = reading, exclude
        self.separators: Counter[str] = Counter()
        self.description = description or ", ".join(map(str, paths))

    def inventory(self) -> Inventory:
        """只看名字，不读内容。"""
        seen = Inventory(self.reading.what)
        for path, _ in self._paths(seen):
            seen.read(path, record=path.suffix.lower() in _READERS)
        return seen

    def documents(self) -> Iterator[Document]:
        for path, direct in self._paths(Inventory(self.reading.what)):
            yield from self._open(path, direct)

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(写进报错的位置, 整条记录)；不是记录的文件略过，直接点名的则是错。"""
        for path, direct in self._paths(Inventory(self.reading.what)):
            reader = _RECORDS.get(path.suffix.lower())
            if reader is not None:
                yield from reader(path)
            elif direct:
                raise ValueError(
                    f"{path}: conversations are read from {', '.join(RECORD_SUFFIXES)}: give one "
                    "of these, or use --format text"
                )

    def first_record(self) -> tuple[str, dict[str, Any]] | None:
        """各记录文件里的第一条；一条也没有是 None。"""
        for path, _ in self._paths(Inventory(self.reading.what)):
            reader = _RECORDS.get(path.suffix.lower())
            if reader is not None and (found := next(reader(path), None)) is not None:
                return found
        return None

    def _paths(self, seen: Inventory) -> Iterator[tuple[Path, bool]]:
        for root in self.paths:
            if root.is_dir():
                yield from ((path, False) for path in self._files(root, seen))
            else:
                yield root, True

    def _files(self, root: Path, seen: Inventory) -> Iterator[Path]:
        found = False
        for folder, folders, names in os.walk(root, onerror=_raise):
            inside = Path(folder).relative_to(root)
            here = Path(folder)
            kept = [n for n in sorted(folders) if not self._exclude((inside / n).as_posix())]
            folders[:] = [n for n in kept if seen.enters(here / n)]
            for name in sorted(names):
                path = here / name
                if self._exclude((inside / name).as_posix()) or not seen.opens(path):
                    continue
                if not self.reading.takes(path):
                    seen.leave(path, needs_key=path.suffix.lower() in _NEED_A_KEY)
                    continue
                found = True
                yield path
        if not found:
            wanted = f" with the suffixes {' '.join(self.reading.suffixes)}"
            there = seen.left_out()
            raise NothingToReadError(
                f"{root}: no files{wanted if self.reading.suffixes else ' to read'}"
                + (f"; there are {there}: choose with --suffixes or --text-key" if there else "")
            )

    def _open(self, path: Path, direct: bool) -> Iterator[Document]:
        reader = _READERS.get(path.suffix.lower())
        if reader is not None:
            for number, text in enumerate(reader(path, self.reading.key), start=1):
                # 坏行永远是错误：direct=True
                pieces = partial(iter, (text,))
                yield Document(f"{path}:{number}", pieces, direct=True, plain=False)
            return
        if not self.reading.splits or (not direct and not is_text(path)):
            yield Document(str(path), partial(read_text, path), direct)
            return
        for number, part in enumerate(self._parts(path), start=1):
            yield Document(f"{path}:{number}", part, direct=True)

    def _parts(self, path: Path) -> Iterator[Callable[[], Iterator[str]]]:
        if self.reading.document_separator is not None:
            yield from split_at(read_text(path), self.reading.document_separator, self.separators)
            return
        for line in lines(read_text(path)):
            yield partial(iter, (line,))


def _raise(error: OSError) -> None:
    raise error

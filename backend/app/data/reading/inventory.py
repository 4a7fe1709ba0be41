"""读了什么、没读什么：按后缀计数，好让用户看见被略去的和被当作纯文本的。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_SHOWN = 8


class Inventory:
    """一次遍历的见闻；what 是记录里取的东西。"""

    def __init__(self, what: str) -> None:
        self._what = what
        self.plain: Counter[str] = Counter()
        self.records: Counter[str] = Counter()
        self.twice: list[Path] = []
        self._left: Counter[str] = Counter()
        self._need_key: Counter[str] = Counter()
        self._hidden: list[str] = []
        self._links: list[str] = []
        self._odd: list[str] = []
        self._prepared: list[str] = []
        self._known: set[tuple[int, int]] = set()

    def enters(self, folder: Path) -> bool:
        """隐藏的、链接来的、`gpt2 prepare` 自己写的文件夹不进去。"""
        if folder.name.startswith("."):
            self._hidden.append(folder.name + "/")
        elif folder.is_symlink():
            self._links.append(str(folder))
        elif is_prepared(folder):
            self._prepared.append(str(folder))
        else:
            return True
        return False

    def opens(self, file: Path) -> bool:
        """隐藏的文件、断了的链接、管道之类不读。"""
        if file.name.startswith("."):
            self._hidden.append(file.name)
        elif not file.is_file():
            self._odd.append(str(file))
        else:
            return True
        return False

    def leave(self, file: Path, needs_key: bool) -> None:
        (self._need_key if needs_key else self._left)[file.suffix.lower()] += 1

    def read(self, file: Path, record: bool) -> None:
        (self.records if record else self.plain)[file.suffix.lower()] += 1
        status = file.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in self._known and status.st_ino:
            self.twice.append(file)
        self._known.add(identity)

    def left_out(self) -> str:
        there = (self._left + self._need_key).most_common(_SHOWN)
        hidden = [f"{len(self._hidden)} hidden"] if self._hidden else []
        return ", ".join([*(f"{suffix or '(none)'}: {n}" for suffix, n in there), *hidden])

    def lines(self, splits: bool) -> Iterator[str]:
        """说给用户听的话，一行一件事。"""
        if self.plain:
            how = "split into documents" if splits else "one document a file"
            yield f"to read as plain text, {how}: {counts(self.plain)}"
        if self.records:
            yield f"to read as records, {self._what}: {counts(self.records)}"
        if self._need_key:
            yield f"not read: {counts(self._need_key)} (name the key of their text with --text-key)"
        if self._left:
            yield f"not read: {counts(self._left)} (choose with --suffixes)"
        if self._hidden:
            yield f"not read: {_names(self._hidden)} (hidden; name them as sources to read them)"
        if self._links:
            yield f"not followed: {_names(self._links)} (linked folders; name them as sources)"
        if self._prepared:
            yield f"not read: {_names(self._prepared)} (prepared data)"
        if self._odd:
            yield f"not read: {_names(self._odd)} (broken links or not regular files)"
        if self.twice:
            yield f"read twice: {_names([str(p) for p in self.twice])} (the same file again)"


def is_prepared(folder: Path) -> bool:
    """来源里若有输出的文件夹，不能把自己写的再读进来。"""
    return (folder / "prepare.json").is_file() and (folder / "train").is_dir()


def counts(suffixes: Counter[str]) -> str:
    shown = [f"{n} {suffix or 'without suffix'}" for suffix, n in suffixes.most_common(_SHOWN)]
    rest = len(suffixes) - len(shown)
    return ", ".join(shown) + (f" and {rest} more suffixes" if rest else "")


def _names(names: list[str]) -> str:
    different = list(dict.fromkeys(names))
    shown = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
    return f"{len(names)}: {shown}"

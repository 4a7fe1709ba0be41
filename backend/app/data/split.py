"""先数一遍，再决定哪些文本留作验证，然后切成可以各自编码的小段。

验证集按文档内容的哈希取，与次序无关，重复的文档同在一边；文档太少、哈希给不出所要的份额
时，改取全部文本的末尾（nanoGPT 对单个文件的做法：前 90% 训练，后 10% 验证）。
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from app.data.sources import Document, NotTextError, Sources

Side = Literal["train", "val"]
# 日志以小段计数：改这个数，须同时升 prepare.py 的 SCHEMA_VERSION。
UNIT_CHARS = 1 << 18
_KEY_CHARS = 1 << 16
_SAFE_CUT = re.compile(r"\S(?=[ \n])")
_CUT_WINDOW = 4096


class Census:
    """数过的文本：watch 把文档原样传过去，读完一篇记一篇。"""

    def __init__(self) -> None:
        self.documents = self.characters = self.bytes = self.empty = 0
        self._digest = hashlib.sha256()

    def watch(self, document: Document) -> Iterator[str]:
        digest = hashlib.sha256()
        characters = n_bytes = 0
        for piece in document.pieces():
            data = piece.encode("utf-8")
            digest.update(data)
            characters += len(piece)
            n_bytes += len(data)
            yield piece
        if not characters:
            self.empty += 1
            return
        self._digest.update(digest.digest())
        self.documents += 1
        self.characters += characters
        self.bytes += n_bytes

    def content(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "characters": self.characters,
            "bytes": self.bytes,
            "sha256": self._digest.hexdigest(),
        }


@dataclass(frozen=True)
class Plan:
    """数完之后定下的事；alphabet 只在要求时收集。"""

    content: dict[str, Any]
    split: Literal["none", "hash", "tail"]
    val_fraction: float
    skipped: dict[str, str]
    empty: int
    alphabet: frozenset[str]

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("train",) if self.split == "none" else ("train", "val")

    @property
    def train_characters(self) -> int:
        """split="tail" 时前多少个字符属于训练；算法与 nanoGPT 的 int(n*0.9) 相同。"""
        return int(self.content["characters"] * (1 - self.val_fraction))


class Unit(NamedTuple):
    """一小段文本；end：文档在这里结束。各段单独编码再相接，等于整篇编码。"""

    side: Side
    text: str
    end: bool

    @property
    def n_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def survey(sources: Sources, val_fraction: float, alphabet: bool) -> Plan:
    """读一遍全部来源。

    Raises:
        ValueError: 没有文本；直接点名的文件不是文本；文本短得分不出验证集。
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction={val_fraction} must be in [0, 1)")
    census, skipped, seen = Census(), {}, set[str]()
    val_characters = 0
    for document in sources.documents():
        before, key, found = census.characters, None, set[str]()
        try:
            for piece in census.watch(document):
                key = _key(piece) if key is None else key
                if alphabet:
                    found.update(piece)
        except NotTextError as error:
            if document.direct:
                raise
            skipped[document.name] = str(error)
            continue
        seen |= found
        if key is not None and key < val_fraction:
            val_characters += census.characters - before
    if not census.characters:
        raise ValueError(f"{sources.description}: no text there, nothing to prepare")
    plan = Plan(
        census.content(),
        _choose(val_fraction, val_characters / census.characters),
        val_fraction,
        skipped,
        census.empty,
        frozenset(seen),
    )
    if plan.split == "tail" and not 0 < plan.train_characters < census.characters:
        raise ValueError(
            f"{sources.description}: {census.characters} characters are too few to hold out "
            f"val_fraction={val_fraction}: use more text or --val-fraction 0"
        )
    return plan


def _choose(wanted: float, share: float) -> Literal["none", "hash", "tail"]:
    if wanted == 0:
        return "none"
    if wanted / 2 <= share <= min(2 * wanted, (1 + wanted) / 2):
        return "hash"
    return "tail"


def _key(first_piece: str) -> float:
    """文档开头的哈希，[0, 1) 上均匀。"""
    data = first_piece[:_KEY_CHARS].encode("utf-8")
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big") / 2**48


def units(sources: Sources, plan: Plan, census: Census) -> Iterator[Unit]:
    """全部文本，按来源的次序；census 重数一遍，供调用者核对来源没有变。"""
    for document in sources.documents():
        if document.name in plan.skipped:
            continue
        before = census.characters
        pieces = census.watch(document)
        if plan.split == "tail":
            head, tail = _cut_at(pieces, max(0, plan.train_characters - before))
            yield from _pack("train", head)
            yield from _pack("val", tail)
            continue
        first = next(pieces, None)
        if first is not None:
            is_val = plan.split == "hash" and _key(first) < plan.val_fraction
            yield from _pack("val" if is_val else "train", _chain(first, pieces))


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _cut_at(pieces: Iterator[str], characters: int) -> tuple[Iterator[str], Iterator[str]]:
    """前 characters 个字符，其余；须先取完前者。"""
    rest: list[str] = []

    def head() -> Iterator[str]:
        left = characters
        while left > 0:
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece[:left]
            if len(piece) > left:
                rest.append(piece[left:])
            left -= len(piece)

    def tail() -> Iterator[str]:
        yield from rest
        yield from pieces

    return head(), tail()


def _pack(side: Side, pieces: Iterable[str]) -> Iterator[Unit]:
    """合成至多 UNIT_CHARS 个字符的小段；切在哪里只取决于文本，与读入的分块无关。"""
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > UNIT_CHARS:
            cut = _safe_cut(buffer, start, start + UNIT_CHARS)
            yield Unit(side, buffer[start:cut], False)
            start = cut
        buffer = buffer[start:]
    if buffer:
        yield Unit(side, buffer, True)


def _safe_cut(text: str, start: int, end: int) -> int:
    """(start, end] 里最后一个“非空白之后、空格或换行之前”的位置。

    GPT-2 的切分规则从不跨过这样的位置，所以分段编码与整篇编码相同。一段里全无这种位置
    （不是自然文本）就在 end 处硬切，只影响切口两侧的词元。
    """
    for low in (max(start, end - _CUT_WINDOW), start):
        # 多看一个字符，使 end 本身也可以是切口
        found = [match.end() for match in _SAFE_CUT.finditer(text, low, end + 1)]
        if found:
            return found[-1]
    return end

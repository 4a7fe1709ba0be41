"""先数一遍，再决定哪些文本留作验证，然后切成可以各自编码的小段。

验证集按文档内容的哈希取，与次序无关，重复的文档同在一边；文档太少、哈希给不出所要的份额
时，改取全部文本的末尾（nanoGPT 对单个文件的做法：前 90% 训练，后 10% 验证）。
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from app.data.reading.plain_text import NotTextError
from app.data.reading.sources import Document, Sources

Side = Literal["train", "val"]
# 日志以小段计数：改这个数，须同时升 prepare.py 的 SCHEMA_VERSION。
UNIT_CHARS = 1 << 18
_KEY_CHARS = 1 << 16
_SAFE_CUT = re.compile(r"\S(?=[ \n])")
_CUT_WINDOW = 4096
# 别的工具写作特殊词元的样子；在文本里只是普通文字，所以要说一声。
_MARKER = r"<\|\w{1,40}\|>"
_MARKER_CHARS = 64


class Census:
    """数过的文本：watch 把文档原样传过去，读完一篇记一篇。"""

    def __init__(self) -> None:
        self.documents = self.characters = self.bytes = self.empty = 0
        self.last = b""
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
        self.last = digest.digest()
        self._digest.update(self.last)
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
    """数完之后定下的事；alphabet 只在要求时收集。

    held 是用户自己给的验证文本（split="given"），val_documents 是其中的篇数；shared 是两边
    都有的文档的名字，markers 是文本里见到的特殊词元的写法与次数，raw 是看来像 jsonl、却被
    当作纯文本的文件。
    """

    content: dict[str, Any]
    split: Literal["none", "hash", "tail", "given"]
    val_fraction: float
    skipped: dict[str, NotTextError]
    empty: int
    alphabet: frozenset[str]
    markers: Counter[str]
    held: Sources | None
    val_documents: int
    shared: list[str]
    raw: list[str]

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("train",) if self.split == "none" else ("train", "val")

    @property
    def train_characters(self) -> int:
        """split="tail" 时前多少个字符属于训练；算法与 nanoGPT 的 int(n*0.9) 相同。"""
        return int(self.content["characters"] * (1 - self.val_fraction))


class Unit(NamedTuple):
    """一小段文本；begin、end：文档在这里开始、结束。各段单独编码再相接，等于整篇编码。"""

    side: Side
    text: str
    end: bool
    begin: bool = True

    @property
    def n_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def survey(
    sources: Sources,
    val_fraction: float,
    alphabet: bool,
    val: Sources | None = None,
    markers: Collection[str] = (),
) -> Plan:
    """读一遍全部来源；val 给出时它就是验证集，val_fraction 不用。markers 是另外要数的文字。

    Raises:
        ValueError: 没有文本；直接点名的文件不是文本；文本短得分不出验证集。
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction={val_fraction} must be in [0, 1)")
    census, skipped, seen = Census(), {}, set[str]()
    counter, held, shared, raw = _Markers(markers), set[bytes](), [], []
    val_characters = val_documents = 0
    for document, side in _labelled(sources, val):
        before, key, found = census.characters, None, set[str]()
        try:
            for piece in census.watch(document):
                if key is None:
                    key = _key(piece)
                    if document.plain and _is_record(piece):
                        raw.append(document.name)
                counter.feed(piece, document)
                if alphabet:
                    found.update(piece)
        except NotTextError as error:
            if document.direct:
                raise
            skipped[document.name] = error
            continue
        seen |= found
        if side == "val" and key is not None:
            held.add(census.last)
            val_documents += 1
        elif side == "train" and key is not None and census.last in held:
            shared.append(document.name)
        if key is not None and key < val_fraction:
            val_characters += census.characters - before
    if not census.characters:
        raise ValueError(_nothing(sources, skipped))
    for given, n in ((val, val_documents), (sources, census.documents - val_documents)):
        if given is not None and n == 0:
            raise ValueError(_nothing(given, skipped))
    plan = Plan(
        content=census.content(),
        split="given" if val else choose(val_fraction, val_characters / census.characters),
        val_fraction=val_fraction,
        skipped=skipped,
        empty=census.empty,
        alphabet=frozenset(seen),
        markers=counter.found,
        held=val,
        val_documents=val_documents,
        shared=shared,
        raw=raw,
    )
    if plan.split == "tail" and not 0 < plan.train_characters < census.characters:
        raise ValueError(
            f"{sources.description}: {census.characters} characters are too few to hold out "
            f"val_fraction={val_fraction}: use more text or --val-fraction 0"
        )
    return plan


def _is_record(text: str) -> bool:
    """第一行是一个 JSON 对象。"""
    line = text.split("\n", 1)[0]
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _nothing(sources: Sources, skipped: dict[str, NotTextError]) -> str:
    reason = f" ({len(skipped)} files are not UTF-8 text)" if skipped else ""
    return f"{sources.description}: no text there{reason}, nothing to prepare"


def _labelled(sources: Sources, val: Sources | None) -> Iterator[tuple[Document, Side | None]]:
    """用户自己给的验证文本在前：先知道它有哪些文档，才认得出训练文本里的同一篇。"""
    if val is None:
        yield from ((document, None) for document in sources.documents())
        return
    yield from ((document, "val") for document in val.documents())
    yield from ((document, "train") for document in sources.documents())


class _Markers:
    """数文本里的特殊写法；跨两段的也算。"""

    def __init__(self, texts: Collection[str]) -> None:
        parts = [_MARKER, *map(re.escape, sorted(texts, key=len, reverse=True))]
        self._pattern = re.compile("|".join(parts))
        self.found: Counter[str] = Counter()
        self._tail, self._document = "", cast("Document | None", None)

    def feed(self, piece: str, document: Document) -> None:
        tail = self._tail if document is self._document else ""
        text = tail + piece
        self.found.update(
            match[0] for match in self._pattern.finditer(text) if match.end() > len(tail)
        )
        self._tail, self._document = text[-_MARKER_CHARS:], document


def choose(wanted: float, share: float) -> Literal["none", "hash", "tail"]:
    if wanted == 0:
        return "none"
    if wanted / 2 <= share <= min(2 * wanted, (1 + wanted) / 2):
        return "hash"
    return "tail"


def _key(first_piece: str) -> float:
    """文档开头的哈希，[0, 1) 上均匀。"""
    return fraction(first_piece[:_KEY_CHARS].encode("utf-8"))


def fraction(data: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big") / 2**48


def units(sources: Sources, plan: Plan, census: Census) -> Iterator[Unit]:
    """全部文本，按来源的次序；census 重数一遍，供调用者核对来源没有变。"""
    for document, side in _labelled(sources, plan.held):
        if document.name in plan.skipped:
            continue
        if side is not None:
            yield from _pack(side, census.watch(document))
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
    buffer, begin = "", True
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > UNIT_CHARS:
            cut = _safe_cut(buffer, start, start + UNIT_CHARS)
            yield Unit(side, buffer[start:cut], False, begin)
            start, begin = cut, False
        buffer = buffer[start:]
    if buffer:
        yield Unit(side, buffer, True, begin)


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

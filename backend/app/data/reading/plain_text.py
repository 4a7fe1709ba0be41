"""纯文本文件：UTF-8，逐段读出，内存与文件大小无关；按分隔文字或按行切成几篇。"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

_READ_BYTES = 1 << 20
BYTE_ORDER_MARK = "\ufeff"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar")


class NotTextError(ValueError):
    """文件不是 UTF-8 文本；binary：连别的编码的文本也不像。"""

    def __init__(self, message: str, binary: bool) -> None:
        super().__init__(message)
        self.binary = binary


def read_text(path: Path) -> Iterator[str]:
    """一段约 1 MiB；开头的字节序标记不是文本，略去。

    Raises:
        NotTextError: 有 NUL 字节（二进制，UTF-16 也在此列），或不是 UTF-8；点名位置与改法。
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, first = 0, True
    with open(path, "rb") as file:
        while True:
            block = file.read(_READ_BYTES)
            if b"\0" in block:
                _refuse(path, f"NUL byte at {done + block.index(0)}", binary=True)
            try:
                piece = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # 出错的对象里含有上一段留下的半个字符
                carried = len(error.object) - len(block)
                where = done - carried + error.start
                _refuse(path, f"{error.reason} at byte {where}", binary=False)
            if piece and first:
                piece, first = piece.removeprefix(BYTE_ORDER_MARK), False
            if piece:
                yield piece
            if not block:
                return
            done += len(block)


def _refuse(path: Path, reason: str, binary: bool) -> None:
    with open(path, "rb") as file:
        utf16 = file.read(2) in _UTF16_MARKS
    if path.suffix.lower() in PACKED_SUFFIXES:
        fix = "it is packed: unpack it first"
    elif utf16:
        fix = "it looks like UTF-16: convert it with `iconv -f UTF-16 -t UTF-8` or leave it out"
    elif binary:
        fix = "it is binary, or of another encoding: convert it to UTF-8 or leave it out"
    else:
        fix = "convert it to UTF-8 (`iconv -f LATIN1 -t UTF-8`, say) or leave it out"
    raise NotTextError(f"{path}: not UTF-8 text ({reason}): {fix}", binary and not utf16)


def is_text(path: Path) -> bool:
    """整个文件读得下来。"""
    try:
        for _ in read_text(path):
            pass
    except NotTextError:
        return False
    return True


def lines(pieces: Iterator[str]) -> Iterator[str]:
    r"""各行，不带 `\n` 或 `\r\n`。"""
    for document in split_at(pieces, "\n", Counter()):
        yield "".join(document()).removesuffix("\r")


def split_at(
    pieces: Iterator[str], separator: str, found: Counter[str]
) -> Iterator[Callable[[], Iterator[str]]]:
    """separator 之间的各篇，见到几次记进 found；末尾的 separator 之后没有文本，就没有那一篇。

    给出的函数须在取下一篇之前用，且只用一次：各篇共用一个读头。
    """
    reader = _Splitter(pieces, separator, found)
    while reader.more():
        document = reader.document()
        yield lambda document=document: document  # type: ignore[misc]
        for _ in document:  # 没读完的丢掉
            pass


class _Splitter:
    def __init__(self, pieces: Iterator[str], separator: str, found: Counter[str]) -> None:
        self._pieces, self._separator, self._found = pieces, separator, found
        self._buffer, self._place = "", 0

    def more(self) -> bool:
        return self._place < len(self._buffer) or self._read()

    def document(self) -> Iterator[str]:
        size = len(self._separator)
        while True:
            found = self._buffer.find(self._separator, self._place)
            if found >= 0:
                text, self._place = self._buffer[self._place : found], found + size
                self._found[self._separator] += 1
                if text:
                    yield text
                return
            # 缓冲末尾可能是半个分隔文字
            safe = max(self._place, len(self._buffer) - size + 1)
            text, self._place = self._buffer[self._place : safe], safe
            if text:
                yield text
            if not self._read():
                rest, self._place = self._buffer[self._place :], len(self._buffer)
                if rest:
                    yield rest
                return

    def _read(self) -> bool:
        piece = next(self._pieces, None)
        self._buffer, self._place = self._buffer[self._place :] + (piece or ""), 0
        return piece is not None

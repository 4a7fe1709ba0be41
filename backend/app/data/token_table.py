"""分词器共同的部分：接口、一张 id -> 字节串的表、落盘的形状、流式解码。"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from app.common.files import write_atomic

SCHEMA_VERSION = 1
TABLE_FILE = "tokenizer.json"
META_FILE = "tokenizer_meta.json"


class Tokenizer(Protocol):
    """文本与 id 的往返；自家的几种对任何不含孤立代理项的文本都精确还原。"""

    kind: str

    @property
    def vocab_size(self) -> int:
        """id 的上界（最大的 id 加一），含分隔符。"""

    @property
    def document_separator(self) -> int | None:
        """文档结束符的 id，encode 永远不会产生它；None：这个分词器没有分隔符。"""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """生成到其中任何一个就算写完；没有分隔符的为空。"""

    @property
    def special_tokens(self) -> dict[str, int]:
        """{文字: id}，分隔符也在内：只有程序写得出，文本里见到这些文字也只是文字。"""

    def with_special(self, texts: Iterable[str]) -> Tokenizer:
        """另有这些特殊词元的分词器：已有的不重复，新的接在词表之后，原来的 id 都不变。"""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """每段文本之前必有的 id（外来分词器的 BOS）；自家的为空。"""

    @property
    def document_start(self) -> tuple[int, ...]:
        """数据里每篇文档之前要写的：start_ids，除非前一篇的分隔符就是它（OPT）。"""

    @property
    def boundary_id(self) -> int:
        """前面什么也没有时垫的一个 id：start_ids 的末一个、分隔符、换行，再没有就是 0。"""

    def encode(self, text: str) -> list[int]:
        """只有文本的 id：不加开头，文本里写着的特殊词元也只是文本。"""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """每段文本各自编码，给出 uint32 数组（与逐段 encode 相同）。"""

    def encode_continued(self, texts: Sequence[str]) -> list[np.ndarray]:
        """各段都接在别的文本后面（前一个字符不是空白）：不会在开头补空格。"""

    def encode_prompt(self, text: str) -> list[int]:
        """start_ids 加文本；什么都没有时是 [boundary_id]。"""

    def decode(self, ids: Iterable[int]) -> str:
        """坏的 UTF-8 换成 U+FFFD；特殊词元写作它的文字。"""

    def token_bytes(self, token: int) -> bytes: ...

    def byte_length(self, ids: Iterable[int]) -> int:
        """这些 id 代表的文本字节数（特殊词元算 0），用于 bits per byte。"""

    def save(self, folder: str | os.PathLike[str]) -> None: ...

    def fingerprint(self) -> str:
        """sha256：相同的指纹意味着相同的编码。"""


class TableTokenizer:
    """一切都由表和分隔符决定，子类只管编码和怎样写成 JSON。"""

    kind: str

    def __init__(
        self, table: list[bytes], separator: int | None, special: Sequence[str] = ()
    ) -> None:
        """special 是接在表后的特殊词元。"""
        self._separator, self._special_texts = separator, tuple(special)
        self._named = {} if separator is None else {table[separator].decode(): separator}
        self._named |= {text: len(table) + i for i, text in enumerate(special)}
        for text in special:
            if len(text) < 2 or text.encode() in table or len(set(special)) < len(special):
                raise ValueError(
                    f"special token {text!r} is short, twice there or an ordinary token already: "
                    "choose a text such as '<|user|>'"
                )
        self._table = [*table, *map(utf8, special)]

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def document_separator(self) -> int | None:
        return self._separator

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return () if self._separator is None else (self._separator,)

    @property
    def start_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._named)

    def with_special(self, texts: Iterable[str]) -> Tokenizer:
        new = [text for text in dict.fromkeys(texts) if text not in self.special_tokens]
        return self._extended(new) if new else self

    def _extended(self, special: Sequence[str]) -> Tokenizer:
        """另有 special（都是新的）。"""
        raise NotImplementedError

    @property
    def document_start(self) -> tuple[int, ...]:
        return () if self.start_ids == (self._separator,) else self.start_ids

    @property
    def boundary_id(self) -> int:
        if self.start_ids:
            return self.start_ids[-1]
        if self._separator is not None:
            return self._separator
        return self._table.index(b"\n") if b"\n" in self._table else 0

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self._table):
            raise ValueError(
                f"token id {token} is outside the tokenizer's vocabulary of {len(self._table)}"
            )
        return self._table[token]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def byte_length(self, ids: Iterable[int]) -> int:
        special = set(self.special_tokens.values())
        return sum(len(self.token_bytes(int(i))) for i in ids if int(i) not in special)

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def encode_continued(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.encode_batch(texts)

    def encode_prompt(self, text: str) -> list[int]:
        return [*self.start_ids, *self.encode(text)] or [self.boundary_id]

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    def _serialised(self) -> bytes:
        return (json.dumps(self.to_json(), ensure_ascii=True, indent=1) + "\n").encode("ascii")

    def _extra_meta(self) -> dict[str, Any]:
        """tokenizer_meta.json 里另外要记的。"""
        return {}

    def fingerprint(self) -> str:
        return hashlib.sha256(self._serialised()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """写 tokenizer.json 与 tokenizer_meta.json（后写：它在，就说明前者完整）。"""
        data = self._serialised()
        meta = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "document_separator": self.document_separator,
            **self._extra_meta(),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TABLE_FILE, data)
        write_atomic(folder / META_FILE, (json.dumps(meta, indent=2) + "\n").encode("ascii"))


class StreamDecoder:
    """逐批送入 id，逐段给出文本，不切断多字节字符；全部相接等于 decode(全部 id)。"""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        data = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids)
        return self._decoder.decode(data)

    def finish(self) -> str:
        """余下的半个字符（换成 U+FFFD）；之后可从头再用。"""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def utf8(text: str) -> bytes:
    """孤立代理项不是文本：点名拒绝，不悄悄替换。"""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"the text has a lone surrogate U+{code:04X} at character {error.start}; "
            "it cannot be written as UTF-8"
        ) from None

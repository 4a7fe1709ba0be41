"""分词器：字节、字符、GPT-2 BPE、在语料上现场训练的 BPE，同一个接口。

每一种都是一张表：id -> 字节串，外加一个只有程序能写出的文档分隔符。用户文本里的
`<|endoftext|>` 永远是普通文本：Hugging Face tokenizers 会把它变成特殊 id，所以编码只用
tiktoken 的 ordinary 路径。
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from app.common.files import write_atomic
from app.data import byte_level
from app.data.byte_level import SEPARATOR_TEXT, parse_json, read_limited

SCHEMA_VERSION = 1
Kind = Literal["bytes", "chars", "gpt2", "bpe"]
TABLE_FILE = "tokenizer.json"
META_FILE = "tokenizer_meta.json"
_MAX_VOCAB = 10_000_000
# tiktoken 自己记录的下载地址与 sha256（tiktoken_ext/openai_public.py），缓存也由它管。
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer(Protocol):
    """文本与 id 的往返；任何不含孤立代理项的文本都精确还原。"""

    kind: str

    @property
    def vocab_size(self) -> int:
        """id 的个数，含分隔符。"""

    @property
    def document_separator(self) -> int:
        """文档结束符的 id；encode 永远不会产生它。"""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """每段文本各自编码，给出 uint32 数组（与逐段 encode 相同）。"""

    def decode(self, ids: Iterable[int]) -> str:
        """坏的 UTF-8 换成 U+FFFD；分隔符写作 `<|endoftext|>`。"""

    def token_bytes(self, token: int) -> bytes: ...

    def byte_length(self, ids: Iterable[int]) -> int:
        """这些 id 代表的文本字节数（分隔符算 0），用于 bits per byte。"""

    def save(self, folder: str | os.PathLike[str]) -> None: ...

    def fingerprint(self) -> str:
        """sha256：相同的指纹意味着相同的编码。"""


class _TableTokenizer:
    """共同的部分：一切都由表和分隔符决定，子类只管编码和怎样写成 JSON。"""

    kind: str

    def __init__(self, table: list[bytes], separator: int) -> None:
        self._table = table
        self._separator = separator

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def document_separator(self) -> int:
        return self._separator

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self._table):
            raise ValueError(
                f"token id {token} is outside the tokenizer's vocabulary of {len(self._table)}"
            )
        return self._table[token]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def byte_length(self, ids: Iterable[int]) -> int:
        return sum(len(self.token_bytes(int(i))) for i in ids if i != self._separator)

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    def _serialised(self) -> bytes:
        return (json.dumps(self.to_json(), ensure_ascii=True, indent=1) + "\n").encode("ascii")

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
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TABLE_FILE, data)
        write_atomic(folder / META_FILE, (json.dumps(meta, indent=2) + "\n").encode("ascii"))


class ByteTokenizer(_TableTokenizer):
    """256 个字节，分隔符 256。"""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__([bytes([b]) for b in range(256)] + [SEPARATOR_TEXT.encode()], 256)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(t), dtype=np.uint8).astype(np.uint32) for t in texts]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


class CharTokenizer(_TableTokenizer):
    """语料里出现过的字符，按码位排序；分隔符在最后。"""

    kind = "chars"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = sorted(set(characters))
        if not self._characters:
            raise ValueError("a character tokenizer needs at least one character")
        codes = np.array([ord(c) for c in self._characters], dtype=np.uint32)
        self._ids = np.full(int(codes[-1]) + 2, -1, dtype=np.int64)
        self._ids[codes] = np.arange(len(codes))
        table = [_utf8(c) for c in self._characters] + [SEPARATOR_TEXT.encode()]
        super().__init__(table, len(self._characters))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if (ids < 0).any():
            char = chr(int(codes[int(np.argmax(ids < 0))]))
            raise ValueError(f"character {char!r} (U+{ord(char):04X}) is not in the tokenizer")
        return ids.astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": "".join(self._characters)}


class BPETokenizer(_TableTokenizer):
    """字节级 BPE；kind 是 "gpt2"（现成词表）或 "bpe"（现场训练），编码方法相同。

    Raises:
        ValueError: 词表与合并表不自洽（见 byte_level.check_vocabulary）。
    """

    def __init__(
        self,
        kind: Literal["gpt2", "bpe"],
        vocab: dict[str, Any],
        merges: list[tuple[str, str]],
        source: str = "vocabulary",
    ) -> None:
        import tiktoken

        self.kind = kind
        ranks, separator = byte_level.check_vocabulary(vocab, merges, source)
        self._vocab, self._merges = vocab, merges
        table = [b""] * (len(ranks) + 1)
        for token, number in ranks.items():
            table[number] = token
        table[separator] = SEPARATOR_TEXT.encode()
        super().__init__(table, separator)
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=byte_level.GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={SEPARATOR_TEXT: separator},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        _utf8(text)
        # disallowed_special=()：文本里的 <|endoftext|> 是普通文本
        parts = [
            self._encoding.encode_to_numpy(part, disallowed_special=())
            for part in byte_level.split_long_spaces(text)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def to_json(self) -> dict[str, Any]:
        return byte_level.hub_json(self._vocab, self._merges, self._separator)


def chars_tokenizer(texts: Iterable[str]) -> CharTokenizer:
    """语料里的全部字符。"""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    return CharTokenizer(seen)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """在 texts 上训练；语料太小时词表会小于 vocab_size（看 `.vocab_size`）。

    Raises:
        ValueError: vocab_size 小于 257（256 个字节加分隔符）或大得荒唐。
    """
    if not 257 <= vocab_size <= _MAX_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} must be between 257 (256 bytes and the document separator) "
            f"and {_MAX_VOCAB}"
        )
    vocab, merges = byte_level.train(texts, vocab_size - 1)
    return BPETokenizer("bpe", vocab, merges)


def gpt2_tokenizer(vocab_files: str | os.PathLike[str] | None = None) -> BPETokenizer:
    """GPT-2 的 BPE：从本地文件夹，或由 tiktoken 下载（有缓存、有校验）。

    Raises:
        ValueError: 文件夹里没有词表文件，或下载不成。
    """
    if vocab_files is not None:
        return BPETokenizer("gpt2", *byte_level.read_vocab_files(Path(vocab_files)))
    from tiktoken.load import read_file_cached

    try:  # requests 的异常都是 OSError
        merges, vocab = (
            read_file_cached(_GPT2_URL + name, sha) for name, sha in _GPT2_SHA256.items()
        )
    except OSError as error:
        raise ValueError(
            f"the GPT-2 vocabulary could not be downloaded ({type(error).__name__}): give a folder "
            "that holds vocab.bpe and encoder.json with --vocab-files, or use --tokenizer bpe"
        ) from error
    return BPETokenizer("gpt2", *byte_level.parse_vocab_files(merges, vocab, "GPT-2 vocabulary"))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """读回 save 写下的分词器；只读 JSON，核对 sha256。

    Raises:
        ValueError: 缺文件、被截断、被改过、id 重复或越界、合并缺失、大小荒唐。
    """
    folder = Path(folder)
    for name in (META_FILE, TABLE_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name} there, so this is not a tokenizer folder")
    meta = parse_json(read_limited(folder / META_FILE), str(folder / META_FILE))
    _check_meta(meta, str(folder / META_FILE))
    path = folder / TABLE_FILE
    data = read_limited(path)
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise ValueError(
            f"{path}: the sha256 differs from the one in {META_FILE}: the file was changed or cut; "
            "prepare the data again or restore the file"
        )
    tokenizer = _from_json(meta["kind"], parse_json(data, str(path)), str(path))
    for name in ("vocab_size", "document_separator"):
        if getattr(tokenizer, name) != meta[name]:
            raise ValueError(
                f"{path}: {name} is {getattr(tokenizer, name)}, but {META_FILE} says {meta[name]}"
            )
    return tokenizer


def _check_meta(meta: Any, source: str) -> None:
    if not isinstance(meta, dict):
        raise ValueError(f"{source}: expected a mapping, got {type(meta).__name__}")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{source}: schema_version={meta.get('schema_version')!r} but this version reads "
            f"{SCHEMA_VERSION}: update the package or prepare the data again"
        )
    if meta.get("kind") not in get_args(Kind):
        raise ValueError(f"{source}: kind={meta.get('kind')!r} is not one of {get_args(Kind)}")
    size, separator = meta.get("vocab_size"), meta.get("document_separator")
    if type(size) is not int or not 2 <= size <= _MAX_VOCAB:
        raise ValueError(f"{source}: vocab_size={size!r} must be between 2 and {_MAX_VOCAB}")
    if type(separator) is not int or not 0 <= separator < size:
        raise ValueError(
            f"{source}: document_separator={separator!r} must be an id below vocab_size={size}"
        )
    if not isinstance(meta.get("sha256"), str):
        raise ValueError(f"{source}: sha256 is missing")


def _from_json(kind: str, data: Any, source: str) -> Tokenizer:
    if not isinstance(data, dict):
        raise ValueError(f"{source}: expected a mapping, got {type(data).__name__}")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        characters = data.get("characters")
        if not isinstance(characters, str) or len(set(characters)) != len(characters):
            raise ValueError(f"{source}: characters must be a text of distinct characters")
        return CharTokenizer(characters)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{source}: no model.vocab and model.merges")
    if not all(isinstance(line, str) for line in merges):
        raise ValueError(f"{source}: model.merges must be a list of texts")
    pairs = byte_level.parse_merges("\n".join(merges), source)
    return BPETokenizer("bpe" if kind == "bpe" else "gpt2", vocab, pairs, source)


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


def _utf8(text: str) -> bytes:
    """孤立代理项不是文本：点名拒绝，不悄悄替换。"""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"the text has a lone surrogate U+{code:04X} at character {error.start}; "
            "it cannot be written as UTF-8"
        ) from None

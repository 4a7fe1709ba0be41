"""分词器：字节、字符、GPT-2 BPE、在语料上现场训练的 BPE，同一个接口。

每一种都是一张表：id -> 字节串，外加一个只有程序能写出的文档分隔符。用户文本里的
`<|endoftext|>` 永远是普通文本：Hugging Face tokenizers 会把它变成特殊 id，所以编码只用
tiktoken 的 ordinary 路径。
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from app.data import byte_level
from app.data.byte_level import SEPARATOR_TEXT, parse_json, read_limited
from app.data.hub_tokenizer import MAX_VOCAB, HubTokenizer
from app.data.token_table import META_FILE as META_FILE
from app.data.token_table import SCHEMA_VERSION, TableTokenizer, utf8
from app.data.token_table import TABLE_FILE as TABLE_FILE
from app.data.token_table import StreamDecoder as StreamDecoder
from app.data.token_table import Tokenizer as Tokenizer

# "hub" 只能读入（见 hub_tokenizer），其余几种可以现造。
Kind = Literal["bytes", "chars", "gpt2", "bpe"]
_KINDS = (*get_args(Kind), HubTokenizer.kind)
# tiktoken 自己记录的下载地址与 sha256（tiktoken_ext/openai_public.py），缓存也由它管。
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class _Separated(TableTokenizer):
    """总有分隔符的几种。"""

    def __init__(self, table: list[bytes], separator: int, special: Sequence[str] = ()) -> None:
        super().__init__(table, separator, special)
        self._end = separator

    @property
    def document_separator(self) -> int:
        return self._end


class ByteTokenizer(_Separated):
    """256 个字节，分隔符 256。"""

    kind = "bytes"

    def __init__(self, special: Sequence[str] = ()) -> None:
        table = [bytes([b]) for b in range(256)] + [SEPARATOR_TEXT.encode()]
        super().__init__(table, 256, special)

    def _extended(self, special: Sequence[str]) -> ByteTokenizer:
        return ByteTokenizer([*self._special_texts, *special])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(t), dtype=np.uint8).astype(np.uint32) for t in texts]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **_special_json(self._special_texts)}


class CharTokenizer(TableTokenizer):
    """一个字符一个 id，按初次给出的次序；分隔符（若有）在最后。

    separator=False：外来的字符模型，词表里没有多出的那一行。

    Raises:
        ValueError: 没有字符。
    """

    kind = "chars"

    def __init__(
        self, characters: Iterable[str], separator: bool = True, special: Sequence[str] = ()
    ) -> None:
        self._characters = list(dict.fromkeys(characters))
        if not self._characters:
            raise ValueError("a character tokenizer needs at least one character")
        codes = np.array([ord(c) for c in self._characters], dtype=np.uint32)
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int64)
        self._ids[codes] = np.arange(len(codes))
        table = [utf8(c) for c in self._characters]
        if separator:
            table.append(SEPARATOR_TEXT.encode())
        super().__init__(table, len(self._characters) if separator else None, special)

    def _extended(self, special: Sequence[str]) -> CharTokenizer:
        has_end = self._separator is not None
        return CharTokenizer(self._characters, has_end, [*self._special_texts, *special])

    @property
    def characters(self) -> tuple[str, ...]:
        return tuple(self._characters)

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
        plain: dict[str, Any] = {"kind": self.kind, "characters": "".join(self._characters)}
        plain |= {} if self._separator is not None else {"separator": False}
        return plain | _special_json(self._special_texts)


class BPETokenizer(_Separated):
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
        special: Sequence[str] = (),
    ) -> None:
        import tiktoken

        self.kind = self._kind = kind
        ranks, separator = byte_level.check_vocabulary(vocab, merges, source)
        self._vocab, self._merges = vocab, merges
        table = [b""] * (len(ranks) + 1)
        for token, number in ranks.items():
            table[number] = token
        table[separator] = SEPARATOR_TEXT.encode()
        super().__init__(table, separator, special)
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=byte_level.GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={SEPARATOR_TEXT: separator},
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        utf8(text)
        # disallowed_special=()：文本里的 <|endoftext|> 是普通文本
        parts = [
            self._encoding.encode_to_numpy(part, disallowed_special=())
            for part in byte_level.split_long_spaces(text)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def to_json(self) -> dict[str, Any]:
        end, special = self.document_separator, self._special_texts
        return byte_level.hub_json(self._vocab, self._merges, end, special)

    def _extended(self, special: Sequence[str]) -> BPETokenizer:
        texts = [*self._special_texts, *special]
        return BPETokenizer(self._kind, self._vocab, self._merges, special=texts)


def chars_tokenizer(texts: Iterable[str]) -> CharTokenizer:
    """语料里的全部字符，按码位排序：与文本的次序无关。"""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    return CharTokenizer(sorted(seen))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """在 texts 上训练；语料太小时词表会小于 vocab_size（看 `.vocab_size`）。

    Raises:
        ValueError: vocab_size 小于 257（256 个字节加分隔符）或大得荒唐。
    """
    if not 257 <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size} must be between 257 (256 bytes and the document separator) "
            f"and {MAX_VOCAB}"
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
    tokenizer = _from_json(meta, data, str(path))
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
    if meta.get("kind") not in _KINDS:
        raise ValueError(f"{source}: kind={meta.get('kind')!r} is not one of {_KINDS}")
    size = meta.get("vocab_size")
    if type(size) is not int or not 1 <= size <= MAX_VOCAB:
        raise ValueError(f"{source}: vocab_size={size!r} must be between 1 and {MAX_VOCAB}")
    for name in ("document_separator", "stop_ids"):
        given = meta.get(name)
        for number in given if isinstance(given, list) else [] if given is None else [given]:
            if type(number) is not int or not 0 <= number < size:
                raise ValueError(
                    f"{source}: {name}={number!r} must be an id below vocab_size={size}"
                )
    if not isinstance(meta.get("sha256"), str):
        raise ValueError(f"{source}: sha256 is missing")


def _from_json(meta: dict[str, Any], content: bytes, source: str) -> Tokenizer:
    kind, data = meta["kind"], parse_json(content, source)
    if kind == HubTokenizer.kind:
        stops = meta.get("stop_ids")
        return HubTokenizer(content.decode("utf-8"), meta["document_separator"], stops, source)
    tokenizer = _own(kind, data, source)
    # 自家的几种只有这些内容：多出的规范化、添加的词元之类若不理会，id 就悄悄不同
    written = tokenizer.to_json()
    if written != data:
        other = sorted(k for k in {*written, *data} if written.get(k) != data.get(k))
        raise ValueError(
            f"{source}: {', '.join(other)} differ from what a {kind!r} tokenizer holds: "
            "`gpt2 import` reads tokenizers of other makers"
        )
    return tokenizer


def _own(kind: str, data: Any, source: str) -> TableTokenizer:
    if not isinstance(data, dict):
        raise ValueError(f"{source}: expected a mapping, got {type(data).__name__}")
    if kind == "bytes":
        return ByteTokenizer(_special_texts(data.get("special", []), source))
    if kind == "chars":
        characters = data.get("characters")
        if not isinstance(characters, str) or len(set(characters)) != len(characters):
            raise ValueError(f"{source}: characters must be a text of distinct characters")
        special = _special_texts(data.get("special", []), source)
        return CharTokenizer(characters, data.get("separator", True) is not False, special)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{source}: no model.vocab and model.merges")
    if not all(isinstance(line, str) for line in merges):
        raise ValueError(f"{source}: model.merges must be a list of texts")
    pairs = byte_level.parse_merges("\n".join(merges), source)
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{source}: added_tokens must be a list of objects")
    extra = [t.get("content") for t in added if t.get("id", -1) >= len(vocab)]
    texts = _special_texts(extra, source)
    return BPETokenizer("bpe" if kind == "bpe" else "gpt2", vocab, pairs, source, texts)


def _special_json(texts: Sequence[str]) -> dict[str, Any]:
    return {"special": list(texts)} if texts else {}


def _special_texts(given: Any, source: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{source}: special must be a list of texts")
    return given

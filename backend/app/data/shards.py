"""磁盘上的数据集：一个文件夹。

    tokens-00000.bin …   小端 uint16（词表不过 65536 时）或 uint32，没有文件头
    index.npy            每篇文档第一个词元的全局位置，int64
    meta.json            计数、每个文件的字节数与 sha256、来源；最后写，它在就说明完整
    tokenizer.json …     写下它的分词器

对话与偏好（版式 2）一例一篇，另有：

    scored.npy           计分的词元的区间 [起, 止)，(S, 2) int64，递增、不跨例
    chat.json            写下它的模板

文本的每篇文档以分隔符结尾，没有分隔符的分词器除外；例的结尾由模板定。形状：length 是请求的词元数。
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from app.common.files import sha256_file
from app.data.chat.template import CHAT_FILE, Template, find_template
from app.data.tokenizers import Tokenizer, load_tokenizer

SCHEMA_VERSION = 1
CHAT_SCHEMA_VERSION = 2
Kind = Literal["text", "chat", "pairs", "preference"]
META_FILE = "meta.json"
INDEX_FILE = "index.npy"
SCORED_FILE = "scored.npy"
_MAX_META_BYTES = 64 * 2**20
_SCAN_TOKENS = 1 << 22
_AGAIN = "prepare the data again into a new folder"


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def fingerprint(meta: dict[str, Any]) -> str:
    """数据集的身份：分词器与每个文件的内容；来源的写法不算在内。"""
    content = {"tokenizer": meta["tokenizer"], "dtype": meta["dtype"], "files": meta["files"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


class TokenDataset:
    """只读的词元序列；文件映射进内存，不占工作内存。用 `TokenDataset.open` 打开。"""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self.n_tokens: int = meta["n_tokens"]
        self.vocab_size: int = meta["tokenizer"]["vocab_size"]
        self.fingerprint = fingerprint(meta)
        dtype = token_dtype(self.vocab_size)
        self.kind: Kind = meta.get("kind", "text")
        self._names = [f["name"] for f in meta["files"] if f["name"].startswith("tokens-")]
        self._shards = [np.memmap(folder / name, dtype=dtype, mode="r") for name in self._names]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.document_starts: np.ndarray = _open_array(folder / INDEX_FILE, 1)
        scored = None if self.kind == "text" else _open_array(folder / SCORED_FILE, 2)
        self.scored_spans: np.ndarray | None = scored

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], verify: Literal["size", "sha256"] = "size"
    ) -> TokenDataset:
        """打开并核对。"size" 只看文件大小；"sha256" 还读一遍全部内容，并核对每个 id。

        Raises:
            ValueError: 点名坏掉的文件和改法。
        """
        if verify not in ("size", "sha256"):
            raise ValueError(f"verify={verify!r} is not one of 'size', 'sha256'")
        path = Path(folder)
        meta = _read_meta(path)
        for entry in meta["files"]:
            _check_size(path / entry["name"], entry["bytes"])
        if verify == "sha256":
            for entry in meta["files"]:
                if sha256_file(path / entry["name"]) != entry["sha256"]:
                    raise ValueError(
                        f"{path / entry['name']}: the sha256 differs from the one in {META_FILE}: "
                        f"the file was changed; restore it, or {_AGAIN}"
                    )
        dataset = cls(path, meta)
        dataset._check_index()
        dataset._check_scored()
        if verify == "sha256":
            dataset._check_ids()
        return dataset

    def tokenizer(self) -> Tokenizer:
        """文件夹里的分词器，须与写下这些词元的是同一个。"""
        tokenizer = load_tokenizer(self.folder)
        wanted = self.meta["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint() != wanted:
            raise ValueError(
                f"{self.folder}: the tokenizer there has fingerprint "
                f"{tokenizer.fingerprint()[:12]}, but the tokens were written with {wanted[:12]}: "
                f"restore the tokenizer files, or {_AGAIN}"
            )
        return tokenizer

    def template(self) -> Template:
        """文件夹里的对话模板，须与写下这些词元的是同一个。"""
        wanted, template = self.meta.get("chat"), find_template(self.folder)
        if wanted is None or template is None or template.fingerprint() != wanted["fingerprint"]:
            raise ValueError(
                f"{self.folder}: the chat template there is not the one that wrote the tokens: "
                f"restore {CHAT_FILE}, or {_AGAIN}"
            )
        return template

    def read(self, start: int, length: int) -> np.ndarray:
        """[start, start + length) 的词元，跨分片：(length,) int64。"""
        self._check_range(start, length)
        result = np.empty(length, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < length:
            tokens = self._shards[shard]
            first = start + done - (int(self._ends[shard]) - len(tokens))
            part = tokens[first : first + length - done]
            result[done : done + len(part)] = part
            done += len(part)
            shard += 1
        # 分片在打开之后被人改写，也要在这里说清，而不是在嵌入层里变成 IndexError
        if length and int(result.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: token id {int(result.max())} at tokens {start} to "
                f"{start + length - 1} is outside the vocabulary of {self.vocab_size}: {_AGAIN}"
            )
        return result

    def segments(self, start: int, length: int) -> np.ndarray:
        """每个词元属于第几篇文档（全局编号，从 0 起）：(length,) int64。"""
        self._check_range(start, length)
        starts = self.document_starts
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, start + length, side="left"))
        result = np.zeros(length, dtype=np.int64)
        result[starts[first + 1 : last] - start] = 1
        return first + np.cumsum(result)

    def scored(self, start: int, length: int) -> np.ndarray:
        """各词元计不计分：(length,) bool；文本的全都计分。"""
        self._check_range(start, length)
        if self.scored_spans is None:
            return np.ones(length, dtype=bool)
        begins, ends = self.scored_spans[:, 0], self.scored_spans[:, 1]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(begins, start + length, side="left"))
        result = np.zeros(length, dtype=bool)
        for begin, end in self.scored_spans[first:last].tolist():
            result[max(begin - start, 0) : end - start] = True
        return result

    @property
    def n_scored(self) -> int:
        """计分的词元总数。"""
        spans = self.scored_spans
        return self.n_tokens if spans is None else int((spans[:, 1] - spans[:, 0]).sum())

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise ValueError(
                f"tokens {start} to {start + length} are outside the dataset's "
                f"{self.n_tokens} tokens ({self.folder})"
            )

    def _check_index(self) -> None:
        path, starts = self.folder / INDEX_FILE, self.document_starts
        total = int(self._ends[-1]) if len(self._ends) else 0
        if total != self.n_tokens or self.n_tokens < 1:
            raise ValueError(
                f"{self.folder / META_FILE}: n_tokens={self.n_tokens}, "
                f"but the token files hold {total}: {_AGAIN}"
            )
        if len(starts) != self.meta["n_documents"] or len(starts) < 1 or starts[0] != 0:
            raise ValueError(
                f"{path}: {len(starts)} documents from token {starts[:1].tolist()}, but "
                f"{META_FILE} says {self.meta['n_documents']} documents from token 0: {_AGAIN}"
            )
        for first in range(0, len(starts), _SCAN_TOKENS):
            part = starts[first : first + _SCAN_TOKENS + 1]
            if (np.diff(part) <= 0).any() or part[-1] >= self.n_tokens:
                raise ValueError(
                    f"{path}: document starts must grow and stay below {self.n_tokens}: {_AGAIN}"
                )

    def _check_scored(self) -> None:
        spans, path = self.scored_spans, self.folder / SCORED_FILE
        if spans is None:
            return
        borders = np.asarray(spans).reshape(-1)
        inside = len(spans) and borders[0] >= 0 and borders[-1] <= self.n_tokens
        if spans.shape[1:] != (2,) or not inside or (np.diff(borders) < 0).any():
            raise ValueError(
                f"{path}: {len(spans)} spans of scored tokens, which must grow and stay within "
                f"{self.n_tokens}: {_AGAIN}"
            )

    def _check_ids(self) -> None:
        for name, shard in zip(self._names, self._shards, strict=True):
            path = self.folder / name
            for first in range(0, len(shard), _SCAN_TOKENS):
                # 读进来而不经映射：映射过的页会一直算作这个进程占的内存。
                part = np.fromfile(path, shard.dtype, _SCAN_TOKENS, offset=first * shard.itemsize)
                top = int(part.max())
                if top >= self.vocab_size:
                    raise ValueError(
                        f"{path}: token id {top} is outside the vocabulary of {self.vocab_size}: "
                        f"{_AGAIN}"
                    )


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such dataset folder: run `gpt2 prepare` first")
    if not path.is_file():
        inner = [name for name in ("train", "val") if (folder / name / META_FILE).is_file()]
        hint = (
            f"open {folder / inner[0]}"
            if inner
            else "run the same `gpt2 prepare` again to finish it"
        )
        raise ValueError(f"{folder}: no {META_FILE} there, so this is not a dataset: {hint}")
    if path.stat().st_size > _MAX_META_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes is too large: {_AGAIN}")
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}): {_AGAIN}") from None
    _check_meta(meta, path)
    return meta


def _check_meta(meta: Any, path: Path) -> None:
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(meta).__name__}: {_AGAIN}")
    version, kind = meta.get("schema_version"), meta.get("kind", "text")
    if version not in (SCHEMA_VERSION, CHAT_SCHEMA_VERSION):
        raise ValueError(
            f"{path}: schema_version={version!r} but this version reads {SCHEMA_VERSION} and "
            f"{CHAT_SCHEMA_VERSION}: update the package, or {_AGAIN}"
        )
    if kind not in get_args(Kind) or (kind == "text") != (version == SCHEMA_VERSION):
        raise ValueError(f"{path}: kind={kind!r} with schema_version={version}: {_AGAIN}")
    tokenizer = meta.get("tokenizer")
    vocab_size = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if type(vocab_size) is not int or vocab_size < 1 or "fingerprint" not in (tokenizer or {}):
        raise ValueError(f"{path}: tokenizer.vocab_size={vocab_size!r} is not usable: {_AGAIN}")
    if meta.get("dtype") != token_dtype(vocab_size).name:
        raise ValueError(
            f"{path}: dtype={meta.get('dtype')!r}, but a vocabulary of {vocab_size} is stored as "
            f"{token_dtype(vocab_size).name}: {_AGAIN}"
        )
    for name in ("n_tokens", "n_documents", "n_bytes"):
        if type(meta.get(name)) is not int or meta[name] < 0:
            raise ValueError(f"{path}: {name}={meta.get(name)!r} is not a count: {_AGAIN}")
    extra = [INDEX_FILE] if kind == "text" else [INDEX_FILE, SCORED_FILE]
    _check_files(meta.get("files"), extra, token_dtype(vocab_size).itemsize, path)


def _check_files(files: Any, extra: list[str], item_bytes: int, path: Path) -> None:
    """文件名只许是我们自己的那几个：meta.json 不能指到文件夹外面去。"""
    if not isinstance(files, list) or not all(isinstance(f, dict) for f in files):
        raise ValueError(f"{path}: files must be a list: {_AGAIN}")
    names = [f.get("name") for f in files]
    wanted = [shard_name(i) for i in range(len(files) - len(extra))] + extra
    if names != wanted:
        raise ValueError(f"{path}: files are {names}, expected {wanted}: {_AGAIN}")
    for entry in files:
        size = entry.get("bytes")
        if type(size) is not int or size < 1 or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"{path}: {entry['name']} has bytes={size!r}: {_AGAIN}")
        if entry["name"] not in extra and size % item_bytes:
            raise ValueError(
                f"{path}: {entry['name']} has {size} bytes, not a multiple of {item_bytes}: "
                f"{_AGAIN}"
            )


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing: restore it, or {_AGAIN}")
    if path.stat().st_size != size:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, but {META_FILE} says {size}: "
            f"the file was cut or changed; restore it, or {_AGAIN}"
        )


def _open_array(path: Path, dimensions: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a NumPy index ({error}): {_AGAIN}") from None
    if values.dtype != np.dtype("<i8") or values.ndim != dimensions:
        raise ValueError(
            f"{path}: {values.dtype} with {values.ndim} dimensions, expected int64 with "
            f"{dimensions}: {_AGAIN}"
        )
    return values

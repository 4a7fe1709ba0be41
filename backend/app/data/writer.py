"""写数据集：只追加，随时可被杀掉，按记下的长度截回去就能接着写。

写着的分片叫 tokens-NNNNN.bin.tmp，满了就同步并改名；文档起点先记在 index.tmp 里，收尾时
写成 index.npy。checkpoint() 同步后给出的状态与磁盘一致；磁盘上多出的部分属于被杀的那次。
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from app.common.files import sha256_file, sync_folder, write_atomic
from app.data.chat.template import Template
from app.data.shards import (
    CHAT_SCHEMA_VERSION,
    INDEX_FILE,
    META_FILE,
    SCHEMA_VERSION,
    SCORED_FILE,
    Kind,
    shard_name,
    token_dtype,
)
from app.data.tokenizers import Tokenizer

INDEX_PART = "index.tmp"
SCORED_PART = "scored.tmp"
_COPY_BYTES = 1 << 20
NEW = {"tokens": 0, "documents": 0, "bytes": 0, "inside": False}


class ShardWriter:
    """把词元追加进一个数据集文件夹。

    state 是上次 checkpoint() 的返回值（从头开始用 NEW）：tokens、documents、bytes 是总数，
    inside 说明最后一篇文档还没写完。
    """

    _arrays: tuple[str, ...] = (INDEX_FILE,)
    _form: dict[str, Any] = {"schema_version": SCHEMA_VERSION}

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, state: dict[str, Any]
    ) -> None:
        self.folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokens: int = state["tokens"]
        self._documents: int = state["documents"]
        self._bytes: int = state["bytes"]
        self._inside: bool = state["inside"]
        folder.mkdir(parents=True, exist_ok=True)
        self._restore()

    @property
    def n_tokens(self) -> int:
        return self._tokens

    @property
    def n_documents(self) -> int:
        return self._documents

    @property
    def n_bytes(self) -> int:
        return self._bytes

    def add(self, tokens: np.ndarray, n_bytes: int, end: bool) -> None:
        """追加一段；end 为真时文档到此为止，写上分隔符（若有）。"""
        if len(tokens) and int(tokens.max()) >= self._tokenizer.vocab_size:
            raise ValueError(
                f"token id {int(tokens.max())} is outside the tokenizer's vocabulary of "
                f"{self._tokenizer.vocab_size}"
            )
        if not self._inside:
            self._index.write(np.int64(self._tokens).astype("<i8").tobytes())
            self._documents += 1
        self._append(tokens.astype(self._dtype, copy=False))
        if end:
            self._append(np.array(self._document_end(), dtype=self._dtype))
        self._inside = not end
        self._bytes += n_bytes

    def checkpoint(self) -> dict[str, Any]:
        """同步到磁盘，并给出可以从这里接着写的状态。"""
        for file in (self._shard, self._index):
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        return {
            "tokens": self._tokens,
            "documents": self._documents,
            "bytes": self._bytes,
            "inside": self._inside,
        }

    def close(self) -> None:
        self._shard.close()
        self._index.close()

    def finish(self, source: dict[str, Any]) -> None:
        """收尾：最后一个分片、index.npy、分词器，最后是 meta.json。"""
        self.checkpoint()
        self.close()
        last = self._tokens // self._shard_tokens
        if self._tokens % self._shard_tokens:
            os.replace(self._part(last), self.folder / shard_name(last))
            last += 1
        else:
            self._part(last).unlink()
        self._write_arrays()
        self._tokenizer.save(self.folder)
        meta = {
            **self._form,
            "dtype": self._dtype.name,
            "tokenizer": {
                "kind": self._tokenizer.kind,
                "vocab_size": self._tokenizer.vocab_size,
                "document_separator": self._tokenizer.document_separator,
                "fingerprint": self._tokenizer.fingerprint(),
            },
            "n_tokens": self._tokens,
            "n_documents": self._documents,
            "n_bytes": self._bytes,
            "source": source,
            "files": [
                {"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for name in [*map(shard_name, range(last)), *self._arrays]
                for path in [self.folder / name]
            ],
        }
        write_atomic(self.folder / META_FILE, (json.dumps(meta, indent=2) + "\n").encode("ascii"))

    def _part(self, number: int) -> Path:
        return self.folder / (shard_name(number) + ".tmp")

    def _restore(self) -> None:
        """把文件夹退回到状态所说的样子：多出的分片删去，写着的截短。"""
        number, inside = divmod(self._tokens, self._shard_tokens)
        part, final = self._part(number), self.folder / shard_name(number)
        if final.exists():  # 记下状态之后才写满的
            os.replace(final, part)
        extra = number + 1
        while (path := self.folder / shard_name(extra)).exists():
            path.unlink()
            extra += 1
        for path in self.folder.glob("tokens-*.bin.tmp"):
            if path != part:
                path.unlink()
        self._shard = _open_at(part, inside * self._dtype.itemsize)
        self._index = _open_at(self.folder / INDEX_PART, self._documents * 8)

    def _append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            number, used = divmod(self._tokens, self._shard_tokens)
            part = tokens[: self._shard_tokens - used]
            self._shard.write(part.tobytes())
            self._tokens += len(part)
            tokens = tokens[len(part) :]
            if used + len(part) == self._shard_tokens:
                self._seal(number)

    def _seal(self, number: int) -> None:
        self._shard.flush()
        os.fsync(self._shard.fileno())
        self._shard.close()
        os.replace(self._part(number), self.folder / shard_name(number))
        self._shard = _open_at(self._part(number + 1), 0)

    def _document_end(self) -> list[int]:
        """写完一篇之后补上的。"""
        separator = self._tokenizer.document_separator
        return [] if separator is None else [separator]

    def _write_arrays(self) -> None:
        _write_npy(self.folder / INDEX_FILE, self.folder / INDEX_PART, (self._documents,))


class ExampleWriter(ShardWriter):
    """对话与偏好：一例一篇，结尾由模板定；另记计分的区间。被杀过的从头再写。"""

    _arrays = (INDEX_FILE, SCORED_FILE)

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        template: Template,
        kind: Kind,
        shard_tokens: int,
    ) -> None:
        super().__init__(folder, tokenizer, shard_tokens, NEW)
        self._template = template
        self._form = {
            "schema_version": CHAT_SCHEMA_VERSION,
            "kind": kind,
            "chat": {"name": template.name, "fingerprint": template.fingerprint()},
        }
        self._spans = 0
        self._scored = _open_at(folder / SCORED_PART, 0)

    def add_example(self, tokens: np.ndarray, scored: np.ndarray, n_bytes: int) -> None:
        """scored: (n,) bool，各词元计不计分。"""
        borders = np.diff(scored.astype(np.int8), prepend=0, append=0)
        spans = np.stack([np.flatnonzero(borders == 1), np.flatnonzero(borders == -1)], axis=1)
        self._scored.write((spans + self._tokens).astype("<i8").tobytes())
        self._spans += len(spans)
        self.add(tokens, n_bytes, end=True)

    def close(self) -> None:
        super().close()
        self._scored.close()

    def sweep(self) -> None:
        """写完之后，去掉只在途中用的文件。"""
        for name in (INDEX_PART, SCORED_PART):
            (self.folder / name).unlink(missing_ok=True)

    def _document_end(self) -> list[int]:
        return []

    def _write_arrays(self) -> None:
        super()._write_arrays()
        _write_npy(self.folder / SCORED_FILE, self.folder / SCORED_PART, (self._spans, 2))
        self._template.save(self.folder)


def _write_npy(path: Path, part: Path, shape: tuple[int, ...]) -> None:
    """part 里的 int64 加上 .npy 的文件头；按块复制，内存不随大小增长。"""
    temporary = path.with_name(path.name + ".tmp")
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    with open(part, "rb") as source, open(temporary, "wb") as target:
        np.lib.format.write_array_header_1_0(target, header)
        while block := source.read(_COPY_BYTES):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)


def _open_at(path: Path, size: int) -> BinaryIO:
    """打开以追加，长度恰为 size。

    Raises:
        ValueError: 文件比状态所记的短，说明有人动过它。
    """
    actual = path.stat().st_size if path.exists() else 0
    if actual < size:
        raise ValueError(
            f"{path}: {actual} bytes, but {size} had been written: the file was changed; "
            "prepare the data again into a new folder"
        )
    file = open(path, "ab")  # noqa: SIM115
    file.truncate(size)
    return file

"""现成的词元文件（nanoGPT 的 train.bin、val.bin：没有文件头的 uint16 或 uint32）变成数据集。

id 原样搬过来，每遇分隔符算一篇文档的结尾；id 属于哪个分词器，文件里没有，只有用户知道。
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.data.journal import check_folder, write_once
from app.data.shards import TokenDataset
from app.data.tokenizers import Tokenizer
from app.data.writer import INDEX_PART, NEW, ShardWriter

Dtype = Literal["uint16", "uint32"]
_CHUNK = 1 << 20
_LLM_C_MAGIC = (20240520, 20240801)


@dataclass(frozen=True)
class TokenFiles:
    """{"train": 文件, "val": 文件}，和里面整数的类型。

    Raises:
        ValueError: 没有这样的文件、大小不是整数个、有文件头、或类型显然不对。
    """

    sides: dict[str, Path]
    dtype: Dtype

    @classmethod
    def find(cls, paths: Sequence[Path], val: Sequence[Path], dtype: Dtype) -> TokenFiles:
        """一个文件夹（train.bin，或许还有 val.bin），或一个文件；val 另给。"""
        if len(paths) != 1 or len(val) > 1:
            raise ValueError(
                f"--tokens takes one folder with train.bin, or one file, and at most one --val "
                f"file, got {len(paths)} and {len(val)}"
            )
        path, sides = paths[0], {}
        if path.is_dir():
            sides["train"] = path / "train.bin"
            if (path / "val.bin").is_file():
                if val:
                    raise ValueError(f"{path} holds val.bin, and --val {val[0]}: give one of them")
                sides["val"] = path / "val.bin"
        else:
            sides["train"] = path
        if val:
            sides["val"] = val[0] / "val.bin" if val[0].is_dir() else val[0]
        for file in sides.values():
            _check_file(file, np.dtype(dtype).itemsize)
        return cls(sides, dtype)

    def chunks(self, side: str) -> Iterator[np.ndarray]:
        with open(self.sides[side], "rb") as file:
            while data := file.read(_CHUNK * np.dtype(self.dtype).itemsize):
                yield np.frombuffer(data, dtype=np.dtype(self.dtype).newbyteorder("<"))


def _check_file(path: Path, item: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of tokens")
    size = path.stat().st_size
    if not size or size % item:
        raise ValueError(
            f"{path}: {size} bytes are not a whole number of {8 * item}-bit tokens: is the file "
            "complete, and its type right?"
        )
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"\x93NUMPY"):
        raise ValueError(
            f"{path} is a .npy file: write its tokens alone with "
            "`numpy.load(FILE).astype('uint16').tofile('train.bin')`"
        )
    if int.from_bytes(head[:4], "little") in _LLM_C_MAGIC:
        raise ValueError(f"{path} begins with llm.c's header of 1024 bytes: cut it off first")
    if item == 2:
        high = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")[1::2]
        if len(high) >= 8 and not high.any():
            raise ValueError(f"{path}: every second number is 0, as in uint32: use --tokens uint32")


def prepare_tokens(
    files: TokenFiles,
    out: Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    shard_tokens: int,
    say: Callable[[str], None] = print,
) -> dict[str, TokenDataset]:
    """写 out/train 与 out/val；没有 val 文件就留出末尾的 val_fraction。

    Raises:
        ValueError: 有词表之外的 id（点名文件、位置）、out 里有别的东西、不是同一条命令。
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction={val_fraction} must be in [0, 1)")
    check_folder(out)
    content = {side: _survey(files, side, tokenizer) for side in files.sides}
    cuts = _cuts(files, content, val_fraction)
    command = {
        "tokens": files.dtype,
        "tokenizer": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint(),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "content": {f"{side}.{k}": v for side, known in content.items() for k, v in known.items()},
    }

    def write() -> None:
        for side, (source, start, end) in cuts.items():
            origin = {"description": str(files.sides[source]), "split": "tokens", "side": side}
            writer = ShardWriter(out / side, tokenizer, shard_tokens, NEW)
            _copy(_part(files.chunks(source), start, end), tokenizer, writer)
            writer.finish(origin)
            (out / side / INDEX_PART).unlink(missing_ok=True)

    write_once(out, command, write, say)
    return {side: TokenDataset.open(out / side) for side in cuts}


def _survey(files: TokenFiles, side: str, tokenizer: Tokenizer) -> dict[str, Any]:
    digest, done = hashlib.sha256(), 0
    for tokens in files.chunks(side):
        if int(tokens.max()) >= tokenizer.vocab_size:
            place = int(np.argmax(tokens >= tokenizer.vocab_size))
            raise ValueError(
                f"{files.sides[side]}: token {done + place} is {int(tokens[place])}, outside the "
                f"{tokenizer.kind} tokenizer's {tokenizer.vocab_size} ids: name the tokenizer that "
                f"wrote the file with --tokenizer, and its type with --tokens (now {files.dtype})"
            )
        digest.update(tokens.tobytes())
        done += len(tokens)
    return {"tokens": done, "sha256": digest.hexdigest()}


def _cuts(
    files: TokenFiles, content: dict[str, Any], val_fraction: float
) -> dict[str, tuple[str, int, int]]:
    """{写到哪边: (读哪个文件, 从, 到)}。"""
    total = content["train"]["tokens"]
    if "val" in files.sides or val_fraction == 0:
        return {side: (side, 0, content[side]["tokens"]) for side in files.sides}
    cut = int(total * (1 - val_fraction))
    if not 0 < cut < total:
        raise ValueError(
            f"{files.sides['train']}: {total} tokens are too few to hold out "
            f"val_fraction={val_fraction}: use --val-fraction 0"
        )
    return {"train": ("train", 0, cut), "val": ("train", cut, total)}


def _part(chunks: Iterator[np.ndarray], start: int, end: int) -> Iterator[np.ndarray]:
    done = 0
    for tokens in chunks:
        part = tokens[max(0, start - done) : max(0, end - done)]
        done += len(tokens)
        if len(part):
            yield part


def _copy(chunks: Iterator[np.ndarray], tokenizer: Tokenizer, writer: ShardWriter) -> None:
    sizes = np.array([tokenizer.byte_length([i]) for i in range(tokenizer.vocab_size)])
    separator = tokenizer.document_separator
    for tokens in chunks:
        ends = [] if separator is None else np.flatnonzero(tokens == separator).tolist()
        start = 0
        for end in ends:
            part = tokens[start:end]
            writer.add(part, int(sizes[part].sum()), end=True)
            start = end + 1
        if start < len(tokens):
            part = tokens[start:]
            writer.add(part, int(sizes[part].sum()), end=False)

"""滑动窗口的困惑度与每字节比特数。

词元流是 [分隔符] + 文本的词元：开头的分隔符只作上文，不打分，正如训练时每篇文档之前都有
一个；于是文本的每个词元都恰好打分一次，字节数就是全文的。文档在训练里首尾相接、各以分隔符
结尾，窗口跨过边界；这里也一样，分隔符照样打分，但不占字节。

第 k 个窗口从 k·stride 起，至多读 C 个词元，只给前面的窗口没有打过分的目标打分。与 Hugging
Face 的滑动窗口写法（transformers 文档 perplexity 一节，max_length = C + 1）相同，只是分母
用打过分的词元数，而不是窗口损失的平均。
C 上下文长度，N 要打分的词元数。
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from app.common.files import sha256_file
from app.data import split
from app.data.reading.sources import RECORD_SUFFIXES, Reading, Sources
from app.data.shards import META_FILE, TokenDataset
from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Model

from .scoring import Metric, score_rows


class TokenSource(Protocol):
    """可随机读取的词元，不含开头的分隔符。"""

    @property
    def n_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...


@dataclass(frozen=True)
class TextTokens:
    """内存里的词元 (N,) uint32。"""

    tokens: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].astype(np.int64)


@dataclass(frozen=True)
class HeldOut:
    """要打分的数据；name 给人看，identity 是数据集的指纹或文件的 sha256，kind 是数据集的。"""

    name: str
    source: TokenSource
    identity: str
    documents: int
    kind: str = "text"


def open_dataset(folder: Path, tokenizer: Tokenizer) -> HeldOut:
    """准备好的数据集：它的 val 部分；也可直接给出一个部分（DATA/train）。

    Raises:
        ValueError: 没有验证部分，或词元是别的分词器写的。
    """
    path = folder
    if not (folder / META_FILE).is_file():
        path = folder / "val"
        if not path.is_dir() and (folder / "train").is_dir():
            raise ValueError(
                f"{folder} has no validation part: prepare it with --val-fraction above 0, "
                f"or give {folder / 'train'} to score what was trained on"
            )
        if not path.is_dir():
            raise ValueError(
                f"data={folder} is not a prepared dataset: run `gpt2 prepare` first, or score a "
                "text file with --text"
            )
    data = TokenDataset.open(path)
    if data.kind == "preference":
        raise ValueError(
            f"{path} holds preferences, a better and a worse answer to each question: they are no "
            "running text to score; the run's report has its margins"
        )
    written = data.meta["tokenizer"]["fingerprint"]
    if written != tokenizer.fingerprint():
        raise ValueError(
            f"{path} was written with the tokenizer {written[:12]}, but the model has "
            f"{tokenizer.fingerprint()[:12]}: use the data the model was trained on, or score the "
            "text itself with --text"
        )
    _check_siblings(path, written)
    return HeldOut(str(path), data, data.fingerprint, len(data.document_starts), data.kind)


def _check_siblings(part: Path, written: str) -> None:
    """训练与验证部分要是同一个分词器写的；另一部分不在就无从比。"""
    for name in ("train", "val"):
        other = part.with_name(name)
        if other == part or part.name not in ("train", "val"):
            continue
        if (other / META_FILE).is_file():
            found = TokenDataset.open(other).meta["tokenizer"]["fingerprint"]
            if found != written:
                raise ValueError(
                    f"{part} was written with the tokenizer {written[:12]} but {other} with "
                    f"{found[:12]}: they do not belong together; prepare the data again"
                )


def open_text(path: Path, tokenizer: Tokenizer, text_key: str | None = None) -> HeldOut:
    """一个文本文件（一篇文档），或 jsonl、parquet（每行一篇，text_key 的值，默认 text）。

    文档之间是分隔符。

    Raises:
        ValueError: 不是文件、不是 UTF-8 文本、没有文字，有词表之外的字符，或 text_key 用不上。
    """
    if path.is_dir():
        raise ValueError(f"text={path} is a folder: give a file, or a prepared dataset with --data")
    if text_key is not None and path.suffix.lower() not in RECORD_SUFFIXES:
        raise ValueError(
            f"text_key={text_key!r} is for {', '.join(RECORD_SUFFIXES)} files, but text={path} is "
            "read as plain text: leave --text-key out"
        )
    sources = Sources([path], Reading(text_key))
    plan = split.survey(sources, 0.0, alphabet=False)
    census, parts = split.Census(), []
    ends = () if tokenizer.document_separator is None else (tokenizer.document_separator,)
    border = np.array([*ends, *tokenizer.document_start], dtype=np.uint32)
    for unit in split.units(sources, plan, census):
        try:
            encode = tokenizer.encode_batch if unit.begin else tokenizer.encode_continued
            parts.append(encode([unit.text])[0])
        except ValueError as error:
            raise ValueError(
                f"text={path} cannot be encoded with the model's tokenizer: {error}"
            ) from None
        if unit.end and census.documents < plan.content["documents"]:
            parts.append(border)
    return HeldOut(
        str(path), TextTokens(np.concatenate(parts)), sha256_file(path), plan.content["documents"]
    )


class Window(NamedTuple):
    """读流里的 [begin, end]（含 end，它只作目标），给 scored..end 打分；下标 0 是开头的分隔符。"""

    begin: int
    scored: int
    end: int


def windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """每个 1..n_tokens 恰好打分一次；第一个窗口之外，各至少有 context - stride + 1 个上文词元。

    Raises:
        ValueError: stride 不在 1..context：更大会漏掉词元。
    """
    check_stride(stride, context)
    begin, scored = 0, 1
    while scored <= n_tokens:
        end = min(begin + context, n_tokens)
        yield Window(begin, scored, end)
        begin, scored = begin + stride, end + 1


def check_stride(stride: int, context: int) -> None:
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride={stride} must be between 1 and context_size={context}: a larger one would "
            "skip tokens"
        )


def count_windows(n_tokens: int, context: int, stride: int) -> int:
    return 1 + -(-max(0, n_tokens - context) // stride)


class WindowScore(NamedTuple):
    """一个窗口里打过分的：nat 之和、词元数、文本字节数、分隔符数。"""

    nats: float
    tokens: int
    bytes: int
    separators: int


def score_windows(
    model: GPT2Model, tokenizer: Tokenizer, source: TokenSource, *, stride: int, batch_size: int
) -> Iterator[list[WindowScore]]:
    """按次序，每次一批窗口的结果；batch_size 不改变结果。

    Raises:
        ValueError: stride 或 batch_size 越界，或损失不是有限数。
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    separator = tokenizer.document_separator
    sizes = np.array([tokenizer.byte_length([i]) for i in range(tokenizer.vocab_size)])
    batch: list[Window] = []
    total = source.n_tokens
    for window in windows(total, model.config.context_size, stride):
        batch.append(window)
        if len(batch) < batch_size and window.end < total:
            continue
        rows = [_read(source, tokenizer.boundary_id, w) for w in batch]
        first = [w.scored - w.begin for w in batch]
        scores = []
        for row, start, scored in zip(rows, first, score_rows(model, rows, first), strict=True):
            targets = row[start:]
            scores.append(
                WindowScore(
                    math.fsum(scored.nats),
                    len(targets),
                    int(sizes[targets].sum()),
                    int((targets == separator).sum()),
                )
            )
        yield scores
        batch = []


def _read(source: TokenSource, before: int, window: Window) -> np.ndarray:
    """流的第 i 项是第 i-1 个词元；第 0 项是分隔符。"""
    if window.begin:
        return source.read(window.begin - 1, window.end - window.begin + 1)
    return np.concatenate([[before], source.read(0, window.end)])


@dataclass(frozen=True)
class Perplexity:
    """打过分的全部；stderr 是每词元 nat 的标准误，不足两个窗口时 None。"""

    tokens: int
    bytes: int
    separators: int
    windows: int
    nats: float
    stderr: float | None

    def metrics(self) -> dict[str, Metric]:
        """bits per byte：一个字节也没有（只有分隔符）时没有值。"""
        nats = Metric(self.nats / self.tokens, self.stderr)
        bits = Metric(None, None)
        if self.bytes:
            scale = 1 / (math.log(2) * self.bytes)
            spread = None if self.stderr is None else self.stderr * self.tokens * scale
            bits = Metric(self.nats * scale, spread)
        return {"nats per token": nats, "perplexity": nats.exp(), "bits per byte": bits}


def summarize(scores: Sequence[WindowScore]) -> Perplexity:
    """
    标准误把窗口当作整群，用比率估计量（Cochran 1977, Sampling Techniques, 6.3 节）：窗口里的
    词元彼此相关，按词元算会小得不真实。相邻窗口仍相关，所以它略偏小。

    Raises:
        ValueError: 一个窗口也没有。
    """
    if not scores:
        raise ValueError("no window was scored: there is nothing to summarise")
    nats = math.fsum(s.nats for s in scores)
    tokens, count = sum(s.tokens for s in scores), len(scores)
    stderr = None
    if count > 1:
        mean = nats / tokens
        spread = math.fsum((s.nats - mean * s.tokens) ** 2 for s in scores)
        stderr = math.sqrt(spread * count / (count - 1)) / tokens
    return Perplexity(
        tokens=tokens,
        bytes=sum(s.bytes for s in scores),
        separators=sum(s.separators for s in scores),
        windows=count,
        nats=nats,
        stderr=stderr,
    )

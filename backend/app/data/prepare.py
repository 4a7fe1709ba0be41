"""把来源变成 out/train 与 out/val 两个数据集：内存恒定，随时可杀，再来一次接着做。

out/prepare.json 是日志：这条命令是什么、来源的内容是什么、做到了第几小段。每编码约
CHECKPOINT_CHARS 个字符，先把写着的文件同步，再原子地换掉日志；重来时把文件截回日志所记的
长度。各小段单独编码，所以被杀过的与没被杀过的逐字节相同。
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from app.common.progress import count_bytes
from app.data import split, stock
from app.data.journal import (
    JOURNAL_FILE,
    SCHEMA_VERSION,
    check_folder,
    locked,
    read_journal,
    save_journal,
)
from app.data.reading.sources import Sources
from app.data.shards import META_FILE, TokenDataset, token_dtype
from app.data.split import Census, Plan, Unit
from app.data.tokenizers import META_FILE as TOKENIZER_META_FILE
from app.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    chars_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)
from app.data.writer import INDEX_PART, NEW, ShardWriter

SHARD_TOKENS = 1 << 26
DEFAULT_BPE_SIZE = 4096
CHECKPOINT_CHARS = 1 << 25
# 训练 BPE 的样本上限：合并表在几千万字符之后几乎不再变，而训练的内存与时间随样本增长。
BPE_SAMPLE_CHARS = 1 << 25
_BATCH_CHARS = 1 << 21
_ESTIMATE_CHARS = 1 << 20


@dataclass(frozen=True)
class TokenizerSpec:
    """要哪一种分词器；vocab_size 只用于 "bpe"（None = 4096），vocab_files 只用于 "gpt2"。

    given 是现成的分词器，kind 就是它的；special 是另加的特殊词元。
    """

    kind: str
    vocab_size: int | None = None
    vocab_files: Path | None = None
    given: Tokenizer | None = None
    special: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerSpec:
        return cls(tokenizer.kind, given=tokenizer)

    def __post_init__(self) -> None:
        if self.given is not None and (self.vocab_size or self.vocab_files):
            raise ValueError(
                f"vocab_size={self.vocab_size} and vocab_files={self.vocab_files} are for a new "
                f"tokenizer, but one of {self.given.vocab_size} ids is given: leave them out"
            )
        if self.vocab_files is not None and self.kind != "gpt2":
            raise ValueError(
                f"vocab_files={self.vocab_files} belongs to the gpt2 tokenizer, but the tokenizer "
                f"is {self.kind!r}: use --tokenizer gpt2 or leave --vocab-files out"
            )

        if self.vocab_size is not None and self.kind != "bpe":
            raise ValueError(
                f"vocab_size={self.vocab_size} belongs to the bpe tokenizer, but the tokenizer is "
                f"{self.kind!r}, which has its own: use --tokenizer bpe or leave --vocab-size out"
            )

    @property
    def bpe_size(self) -> int:
        return DEFAULT_BPE_SIZE if self.vocab_size is None else self.vocab_size

    def ready(self) -> Tokenizer | None:
        """不必先读文本的分词器；None：要在文本上造。"""
        if self.given is not None:
            return self.extended(self.given)
        if self.kind == "bytes":
            return self.extended(ByteTokenizer())
        return self.extended(gpt2_tokenizer(self.vocab_files)) if self.kind == "gpt2" else None

    def extended(self, tokenizer: Tokenizer) -> Tokenizer:
        return tokenizer.with_special(self.special)

    def identity(self) -> dict[str, Any]:
        special = {"special": list(self.special)} if self.special else {}
        if self.given is not None:
            return {"tokenizer": self.kind, "fingerprint": self.given.fingerprint(), **special}
        if self.kind == "bpe":
            return {"tokenizer": self.kind, "vocab_size": self.bpe_size, **special}
        return {"tokenizer": self.kind, **special}


@dataclass(frozen=True)
class Summary:
    """做完的数据集；bytes_per_token 按全部文本的 UTF-8 字节算。"""

    folder: Path
    documents: int
    tokens: int
    bytes: int
    sides: dict[str, TokenDataset]
    fresh: bool

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def prepare(
    sources: Sources,
    out: Path,
    spec: TokenizerSpec,
    *,
    val: Sources | None = None,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    say: Callable[[str], None] = print,
) -> Summary:
    """编码 sources，写进 out；同一条命令再来一次：接着做，或说明已经做完。

    val 给出时它就是验证集，sources 全部用于训练。

    Raises:
        ValueError: 输入不是文本、out 里有别的东西、out 属于另一条命令、磁盘放不下。
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    check_folder(out)
    stock.take_stock(sources, val, say)
    special = spec.given.special_tokens if spec.given else {}
    plan = split.survey(sources, val_fraction, spec.kind == "chars", val, special)
    stock.tell(plan, sources.reading, say)
    stock.check_separator(sources, val)
    if isinstance(spec.given, CharTokenizer):
        stock.check_characters(spec.given, sources, plan)
    with locked(out):
        share = {"val_documents": plan.val_documents} if val else {"val_fraction": val_fraction}
        command = {
            **spec.identity(),
            **share,
            "shard_tokens": shard_tokens,
            "content": plan.content,
        }
        return _Job(sources, out, spec, plan, command, say).run()


class _Job:
    """一次运行；journal 与 out/prepare.json 的内容一致。"""

    def __init__(
        self,
        sources: Sources,
        out: Path,
        spec: TokenizerSpec,
        plan: Plan,
        command: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.sources, self.out, self.spec, self.plan, self.say = sources, out, spec, plan, say
        self.journal: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "source": {
                "description": sources.description,
                "split": plan.split,
                **{k: v for k, v in command.items() if k != "shard_tokens"},
            },
            "tokenizer": None,
            "units": 0,
            "sides": dict.fromkeys(plan.sides, NEW),
            "finished": False,
        }

    def run(self) -> Summary:
        path = self.out / JOURNAL_FILE
        if path.exists():
            self.journal = read_journal(path, self.journal)
        if self.journal["finished"]:
            self.say(f"{self.out} is already prepared from these sources: nothing to do")
            return self._summary(fresh=False)
        # 分词器和磁盘都成了才落笔：失败的尝试不占住文件夹
        tokenizer = self._tokenizer()
        self._check_disk(tokenizer)
        save_journal(self.out, self.journal)
        tokenizer.save(self.out / "train")
        self._encode(tokenizer)
        self.journal["finished"] = True
        save_journal(self.out, self.journal)
        return self._summary(fresh=True)

    def _tokenizer(self) -> Tokenizer:
        """重来时须与上次的相同；现场训练的从文件夹里读回，省去再训练。"""
        known = self.journal["tokenizer"]
        folder = self.out / "train"
        trained = self.spec.kind == "bpe" and self.spec.given is None
        if known and trained and (folder / TOKENIZER_META_FILE).exists():
            tokenizer = load_tokenizer(folder)
        else:
            tokenizer = self._build()
        if known and known != tokenizer.fingerprint():
            raise ValueError(
                f"{self.out} was begun with another {self.spec.kind} vocabulary (fingerprint "
                f"{known[:12]}, now {tokenizer.fingerprint()[:12]}): "
                "give the same vocabulary, or choose another --out"
            )
        self.journal["tokenizer"] = tokenizer.fingerprint()
        return tokenizer

    def _build(self) -> Tokenizer:
        if (ready := self.spec.ready()) is not None:
            return ready
        if self.spec.kind == "chars":
            return self.spec.extended(chars_tokenizer(self.plan.alphabet))
        self.say(f"training a BPE vocabulary of {self.spec.bpe_size}")
        tokenizer = train_bpe(self._sample(), self.spec.bpe_size)
        if tokenizer.vocab_size < self.spec.bpe_size:
            self.say(
                f"the text gave only {tokenizer.vocab_size} tokens "
                f"of the {self.spec.bpe_size} asked for"
            )
        return self.spec.extended(tokenizer)

    def _sample(self) -> Iterator[str]:
        """训练那一边的文本，均匀取样，至多约 BPE_SAMPLE_CHARS 个字符。"""
        ratio = min(1.0, BPE_SAMPLE_CHARS / self.plan.content["characters"])
        number = 0
        for unit in split.units(self.sources, self.plan, Census()):
            if unit.side == "train":
                if int((number + 1) * ratio) > int(number * ratio):
                    yield unit.text
                number += 1

    def _check_disk(self, tokenizer: Tokenizer) -> None:
        """先说要多少磁盘；放不下就不开始。"""
        characters = tokens = 0
        for unit in split.units(self.sources, self.plan, Census()):
            tokens += len(tokenizer.encode(unit.text)) + unit.end
            characters += len(unit.text)
            if characters >= _ESTIMATE_CHARS:
                break
        content = self.plan.content
        total = round(tokens * content["characters"] / characters)
        need = total * token_dtype(tokenizer.vocab_size).itemsize + 16 * content["documents"]
        free = shutil.disk_usage(self.out).free
        self.say(
            f"about {total:,} tokens of {content['bytes'] / 1e6:,.1f} MB text, "
            f"{need / 1e6:,.1f} MB on disk ({free / 1e9:,.1f} GB free)"
        )
        written = sum(p.stat().st_size for p in self.out.glob("*/tokens-*"))
        if need - written > free:
            raise ValueError(
                f"{self.out}: needs about {need / 1e6:,.0f} MB, but the disk has only "
                f"{free / 1e6:,.0f} MB free: make room or choose another --out"
            )

    def _encode(self, tokenizer: Tokenizer) -> None:
        if all((self.out / side / META_FILE).exists() for side in self.plan.sides):
            self._sweep()
            return
        if self.journal["units"]:
            tokens = sum(side["tokens"] for side in self.journal["sides"].values())
            self.say(f"resuming after {tokens:,} tokens")
        with ExitStack() as stack:
            writers = {
                side: ShardWriter(
                    self.out / side, tokenizer, self.journal["command"]["shard_tokens"], state
                )
                for side, state in self.journal["sides"].items()
            }
            for writer in writers.values():
                stack.callback(writer.close)
            self._write(tokenizer, writers)
            for side, writer in writers.items():
                writer.finish({**self.journal["source"], "side": side})
        self._sweep()

    def _write(self, tokenizer: Tokenizer, writers: dict[str, ShardWriter]) -> None:
        """从日志所记的小段起，编码到底；编码用单线程（两个线程并不更快）。"""
        done, census, pending = self.journal["units"], Census(), 0
        stream = split.units(self.sources, self.plan, census)
        skipped = sum(unit.n_bytes for unit in islice(stream, done))
        with count_bytes("tokenizing", self.plan.content["bytes"], skipped) as advance:
            for batch in _batches(stream):
                for unit, tokens in zip(batch, _tokens(tokenizer, batch), strict=True):
                    writers[unit.side].add(tokens, unit.n_bytes, unit.end)
                    advance(unit.n_bytes)
                    pending += len(unit.text)
                done += len(batch)
                if pending >= CHECKPOINT_CHARS:
                    self._checkpoint(done, writers)
                    pending = 0
        if census.content() != self.plan.content:
            raise ValueError(
                f"{self.sources.description}: the files changed while they were read: "
                "prepare them again into a new folder"
            )
        self._checkpoint(done, writers)

    def _checkpoint(self, units: int, writers: dict[str, ShardWriter]) -> None:
        self.journal["sides"] = {side: w.checkpoint() for side, w in writers.items()}
        self.journal["units"] = units
        save_journal(self.out, self.journal)

    def _sweep(self) -> None:
        for side in self.plan.sides:
            (self.out / side / INDEX_PART).unlink(missing_ok=True)

    def _summary(self, fresh: bool) -> Summary:
        sides = {side: TokenDataset.open(self.out / side) for side in self.journal["sides"]}
        return Summary(
            folder=self.out,
            documents=self.plan.content["documents"],
            tokens=sum(d.n_tokens for d in sides.values()),
            bytes=self.plan.content["bytes"],
            sides=sides,
            fresh=fresh,
        )


def _batches(stream: Iterator[Unit]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    size = 0
    for unit in stream:
        batch.append(unit)
        size += len(unit.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokens(tokenizer: Tokenizer, batch: list[Unit]) -> list[np.ndarray]:
    """每小段的词元；文档开头的另有 document_start。"""
    fresh = iter(tokenizer.encode_batch([u.text for u in batch if u.begin]))
    rest = iter(tokenizer.encode_continued([u.text for u in batch if not u.begin]))
    start = np.array(tokenizer.document_start, dtype=np.uint32)
    return [np.concatenate([start, next(fresh)]) if u.begin else next(rest) for u in batch]

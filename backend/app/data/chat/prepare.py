"""对话与偏好的记录变成 out/train 与 out/val：先整个核对一遍，没有错才落笔。

被杀过的从头再写，与没被杀过的逐字节相同；哪一条留作验证由它的内容决定，与次序无关。
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.data.chat.convert import MOST_EXAMPLES, Example, Turns, example_of, save_examples
from app.data.chat.encode import Encoder
from app.data.chat.forms import Form, renamed
from app.data.chat.shorten import shortened
from app.data.chat.template import Template, builtin
from app.data.journal import JOURNAL_FILE, check_folder, write_once
from app.data.prepare import TokenizerSpec
from app.data.reading.inventory import counts
from app.data.reading.sources import Sources
from app.data.shards import TokenDataset
from app.data.split import Side, choose, fraction
from app.data.tokenizers import Tokenizer, chars_tokenizer, train_bpe
from app.data.writer import ExampleWriter

Long = Literal["drop", "cut-prompt"]
Say = Callable[[str], None]
# 没有指明模板时：文字的提问与回答原样相接，指令用 alpaca 的小标题，几轮的对话用 chatml
_DEFAULTS = {"prompt": "plain", "instruction": "alpaca"}
_MANY = 0.01


@dataclass(frozen=True)
class ChatSpec:
    """怎样写成词元。

    chat: 模板的名字，None = known（分词器那里已有的），没有就按写法选。
    context: 一例至多 context + 1 个词元，None = 不限，训练时放不下的略去。
    long: 放不下的略去，还是从前面剪短。

    Raises:
        ValueError: 要剪短，却没有说多长。
    """

    form: Form
    chat: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    long: Long = "drop"
    known: Template | None = None

    def __post_init__(self) -> None:
        if self.long != "drop" and self.context is None:
            raise ValueError(f"--long {self.long} needs to know how long: add --context N")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1")


@dataclass
class Counts:
    examples: int = 0
    dropped: int = 0
    shortened: int = 0


def prepare_examples(
    sources: Sources,
    out: Path,
    tokenizer: TokenizerSpec,
    spec: ChatSpec,
    *,
    val: Sources | None = None,
    val_fraction: float = 0.1,
    shard_tokens: int = 1 << 26,
    say: Say = print,
) -> dict[str, TokenDataset]:
    """写 out/train 与 out/val，返回两边；同一条命令再来一次说明已经做完。

    Raises:
        ValueError: 坏的记录（点名文件与行）、全都计分或全都放不下；这时什么也没写下。
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    check_folder(out)
    for what, given in (("reading", sources), ("validation text:", val)):
        if given is not None:
            say(f"{what} {given.description}: {counts(given.inventory().records)}")
    survey = _Survey(sources, val, spec, val_fraction)
    for line in survey.lines():
        say(line)
    ready = _tokenizer(tokenizer, survey, say)
    template, ready = _template(spec, ready, say)
    command = {
        "tokenizer": ready.kind,
        "fingerprint": ready.fingerprint(),
        "form": str(spec.form),
        "chat": template.fingerprint(),
        "context": spec.context,
        "long": spec.long,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "content": survey.content(),
    }
    if val is not None:
        # 同样的记录，分在别处，就不是同一条命令
        command["val_examples"] = survey.given

    def write() -> None:
        try:
            _write(survey, Encoder(template, ready), out, shard_tokens, say)
        except ValueError:
            # 不留下写了一半的：改好数据之后，同一个文件夹可以再用
            for path in (out / "train", out / "val"):
                shutil.rmtree(path, ignore_errors=True)
            (out / JOURNAL_FILE).unlink()
            raise

    write_once(out, command, write, say)
    return {side: TokenDataset.open(out / side) for side in survey.sides}


class _Survey:
    """核对过的来源；再读一遍给出各例，和它归哪一边。"""

    def __init__(
        self, sources: Sources, val: Sources | None, spec: ChatSpec, val_fraction: float
    ) -> None:
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction={val_fraction} must be in [0, 1)")
        self._sources, self._val, self.spec, self._fraction = sources, val, spec, val_fraction
        self.alphabet: set[str] = set()
        self._extra = Counter[str]()
        self._digest, held, self._shared = hashlib.sha256(), set[bytes](), list[str]()
        self._keys: list[float] = []
        self.given = 0
        unscored = False
        for example, given in self._read():
            identity = _identity(example)
            self._digest.update(identity)
            self._keys.append(fraction(identity))
            if given == "val":
                held.add(identity)
                self.given += 1
            elif identity in held:
                self._shared.append(example.where)
            for turn in (turn for side in example.sides for turn in side):
                unscored = unscored or not turn.scored
                self.alphabet.update(turn.content)
        if not len(self._keys) - self.given or (val and not self.given):
            empty = val if val and not self.given else sources
            raise ValueError(f"{empty.description}: no records there, nothing to prepare")
        self.all_scored = not unscored
        share = float(np.mean(np.array(self._keys) < val_fraction))
        self.split = "given" if val else choose(val_fraction, share)
        if self.split == "tail" and not 0 < self._tail() < len(self._keys):
            raise ValueError(
                f"{sources.description}: {len(self._keys)} examples are too few to hold out "
                f"val_fraction={val_fraction}: give more, or use --val-fraction 0"
            )

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("train",) if self.split == "none" else ("train", "val")

    @property
    def n_examples(self) -> int:
        return len(self._keys)

    def content(self) -> dict[str, Any]:
        return {"examples": len(self._keys), "sha256": self._digest.hexdigest()}

    def lines(self) -> Iterator[str]:
        yield f"records of the form {self.spec.form}"
        if self._extra:
            yield f"not read: the keys {', '.join(map(repr, sorted(self._extra)))}"
        if self._shared:
            yield (
                f"warning: {len(self._shared):,} examples are in both the training and the "
                f"validation records ({self._shared[0]} is the first): the validation loss will be "
                "too low"
            )
        if self.split == "tail":
            yield (
                f"the examples are too few to hold out {self._fraction:.0%} of them by content: "
                f"the last {self._fraction:.0%} are the validation set"
            )

    def examples(self) -> Iterator[tuple[Example, Side]]:
        digest = hashlib.sha256()
        for number, (example, given) in enumerate(self._read()):
            digest.update(_identity(example))
            yield example, given or self._side(number)
        if digest.digest() != self._digest.digest():
            raise ValueError(
                f"{self._sources.description}: the files changed while they were read: "
                "prepare them again"
            )

    def _side(self, number: int) -> Side:
        if self.split == "tail":
            return "train" if number < self._tail() else "val"
        if self.split == "hash" and self._keys[number] < self._fraction:
            return "val"
        return "train"

    def _tail(self) -> int:
        """split="tail" 时前多少例属于训练。"""
        return int(len(self._keys) * (1 - self._fraction))

    def _read(self) -> Iterator[tuple[Example, Side | None]]:
        known = {*self.spec.form.keys, *self.spec.form.also}
        readers: list[tuple[Sources, Side | None]] = [(self._sources, None)]
        if self._val:
            readers = [(self._val, "val"), (self._sources, "train")]
        for given, side in readers:
            for where, record in given.records():
                record = renamed(record, self.spec.columns, where)
                self._extra.update(record.keys() - known)
                yield example_of(record, self.spec.form, where), side


def _identity(example: Example) -> bytes:
    """只看说了什么、学什么：写法不同而内容相同的，归在同一边。"""
    sides = [[(t.role, t.content, t.scored) for t in side] for side in example.sides]
    data = json.dumps(sides)
    return hashlib.sha256(data.encode("ascii")).digest()


def _tokenizer(spec: TokenizerSpec, survey: _Survey, say: Say) -> Tokenizer:
    if (ready := spec.ready()) is not None:
        return ready
    if spec.kind == "chars":
        # 模板自己的文字也要写得出
        ascii_text = map(chr, range(32, 127))
        return spec.extended(chars_tokenizer(["\n", *ascii_text, *survey.alphabet]))
    say(f"training a BPE vocabulary of {spec.bpe_size}")
    texts = (
        turn.content
        for example, side in survey.examples()
        if side == "train"
        for turns in example.sides
        for turn in turns
    )
    return spec.extended(train_bpe(texts, spec.bpe_size))


def _template(spec: ChatSpec, tokenizer: Tokenizer, say: Say) -> tuple[Template, Tokenizer]:
    """模板，和有它的特殊词元的分词器。"""
    if spec.chat is None and spec.known is not None:
        template, why = spec.known, " (that of the tokenizer's folder; --chat chooses another)"
    else:
        name = spec.chat or _DEFAULTS.get(spec.form.keys[0], "chatml")
        why = "" if spec.chat else f" (--chat chooses another; this is usual for {spec.form})"
        template = builtin(name, tokenizer)
    grown = tokenizer.with_special(template.specials())
    added = sorted(grown.special_tokens.keys() - tokenizer.special_tokens.keys())
    say(f"chat template {template.name}{why}")
    if added:
        say(
            f"the vocabulary grows from {tokenizer.vocab_size:,} to {grown.vocab_size:,} ids by "
            f"{', '.join(added)}"
        )
    return template, grown


def _write(survey: _Survey, encoder: Encoder, out: Path, shard_tokens: int, say: Say) -> None:
    template, tokenizer = encoder.template, encoder.tokenizer
    if survey.all_scored:
        raise ValueError(
            "these records hold nothing but answers, so nothing would be masked: use --format text"
        )
    tally, kind = {side: Counts() for side in survey.sides}, survey.spec.form.kind
    writers = {
        side: ExampleWriter(out / side, tokenizer, template, kind, shard_tokens) for side in tally
    }
    try:
        first: list[Turns] = []
        for example, side in survey.examples():
            if side == "train" and len(first) < MOST_EXAMPLES:
                first.append(example.sides[0])
            sides = _encoded(example, encoder, survey.spec, tally[side])
            for turns, (ids, scored) in zip(example.sides, sides, strict=False):
                n_bytes = sum(len(turn.content.encode("utf-8")) for turn in turns)
                writers[side].add_example(ids, scored, n_bytes)
        for side, writer in writers.items():
            _check(tally[side], side, writer, survey.spec, say)
            description = {"description": survey.spec.form.kind, "side": side}
            writer.finish({**description, **survey.content(), **asdict(tally[side])})
            writer.sweep()
        save_examples(out / "train", first)
    finally:
        for writer in writers.values():
            writer.close()


def _encoded(
    example: Example, encoder: Encoder, spec: ChatSpec, tally: Counts
) -> list[tuple[np.ndarray, np.ndarray]]:
    """放得下的各边；有一边放不下就一边也没有。

    Raises:
        ValueError: 分词器写不出，或角色不在模板里；点名位置。
    """
    try:
        sides = [encoder.conversation(turns) for turns in example.sides]
        limit = None if spec.context is None else spec.context + 1
        if limit is not None and max(len(ids) for ids, _ in sides) > limit:
            fitted = shortened(encoder, example.sides, limit) if spec.long == "cut-prompt" else None
            if fitted is None:
                tally.dropped += 1
                return []
            tally.shortened += 1
            sides = fitted
    except ValueError as error:
        raise ValueError(f"{example.where}: {error}") from None
    tally.examples += 1
    return sides


def _check(tally: Counts, side: str, writer: ExampleWriter, spec: ChatSpec, say: Say) -> None:
    total = tally.examples + tally.dropped
    if not tally.examples:
        raise ValueError(
            f"none of the {total:,} examples of {side} fits in context={spec.context}: use a "
            "longer context, or --long cut-prompt"
        )
    if tally.shortened:
        say(f"{side}: {tally.shortened:,} examples were cut at their front to fit {spec.context}")
    if tally.dropped:
        warn = "warning: " if tally.dropped > _MANY * total else ""
        say(
            f"{warn}{side}: {tally.dropped:,} of {total:,} examples are longer than "
            f"context={spec.context} and were left out"
        )

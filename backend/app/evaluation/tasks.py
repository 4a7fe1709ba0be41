"""本地 jsonl 上的任务：最后一个词（LAMBADA 式）与多项选择，定义同 lm-evaluation-harness。

    {"text": "... the last word"}                              最后一个词
    {"prompt": "...", "choices": ["...", "..."], "answer": 0}  多项选择；也认 ctx、endings、label

一道题是一个或几个请求：上文之后一段续文的对数似然。上文的末尾空白归续文，两段一起编码再
切开，因为分开编码会得到训练里没有的词元（词元的空格在词前）。空的上文换成文档分隔符。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from app.common.files import sha256_file
from app.data.reading.records import jsonl_records
from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Model

from .scoring import Metric, score_rows

Kind = Literal["last word", "multiple choice"]
# 一段之内按长短排序再分批，少补些齐；段要短，因为被打断时只留做完的段。
_BLOCK_BATCHES = 8
_NAMES: dict[Any, str] = {str: "a text", list: "a list of texts", (int, str): "a number or a text"}
_PROMPT, _CHOICES, _ANSWER = ("prompt", "ctx"), ("choices", "endings"), ("answer", "label")


@dataclass(frozen=True)
class Request:
    """一段上文加续文 (n,)；从下标 first 起是续文；cut 是上文左边被截去的词元数。"""

    tokens: np.ndarray
    first: int
    cut: int


@dataclass(frozen=True)
class Item:
    """一道题；choices 是各选项的原文（最后一个词只有一项），answer 是对的那一项。"""

    requests: tuple[Request, ...]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """一个文件里的题。"""

    path: Path
    kind: Kind
    items: tuple[Item, ...]
    sha256: str

    @property
    def tokens(self) -> int:
        return sum(len(r.tokens) for item in self.items for r in item.requests)


def load_task(path: Path, tokenizer: Tokenizer, context_size: int) -> Task:
    """读并编码全部的题；第一行的键定下是哪一种，每一行都要合乎它。

    Raises:
        ValueError: 点名行号与缺了什么；没有一道题；续文本身就放不进上下文。
    """
    kind: Kind | None = None
    items = []
    if not path.is_file():
        raise ValueError(f"task={path} is not a file: give a jsonl file")
    for where, record in jsonl_records(path):
        kind = kind or _kind(record, where)
        texts, choices, answer = (_last_word if kind == "last word" else _choice)(record, where)
        requests = tuple(
            encode_request(tokenizer, context, rest, context_size, where) for context, rest in texts
        )
        items.append(Item(requests, choices, answer))
    if kind is None:
        raise ValueError(f"{path} holds no line: write one JSON object a line")
    return Task(path, kind, tuple(items), sha256_file(path))


def _kind(record: dict[str, Any], where: str) -> Kind:
    if any(key in record for key in _CHOICES):
        return "multiple choice"
    if "text" in record:
        return "last word"
    raise ValueError(
        f"{where}: neither 'text' (last word) nor 'choices' or 'endings' (multiple choice) is there"
    )


_Parsed = tuple[list[tuple[str, str]], tuple[str, ...], int]


def _last_word(record: dict[str, Any], where: str) -> _Parsed:
    text = _get(record, ("text",), str, where).rstrip()
    if not text:
        raise ValueError(f"{where}: 'text' is empty: there is no last word")
    word = text.split()[-1]
    context = text[: -len(word)].rstrip()
    return [(context, text[len(context) :])], (word,), 0


def _choice(record: dict[str, Any], where: str) -> _Parsed:
    prompt = _get(record, _PROMPT, str, where)
    choices = _get(record, _CHOICES, list, where)
    if len(choices) < 2:
        raise ValueError(f"{where}: {len(choices)} choices: give at least two")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(
                f"{where}: choice {number} is {choice!r}: give a text that is not empty"
            )
    context = prompt.rstrip()
    texts = [
        (context, prompt[len(context) :] + _delimiter(record, prompt, choice, where) + choice)
        for choice in choices
    ]
    return texts, tuple(choices), _answer(record, choices, where)


def _delimiter(record: dict[str, Any], prompt: str, choice: str, where: str) -> str:
    """lm-eval 的 target_delimiter 是一个空格；中文之类不用空格的文字写 "delimiter": ""。"""
    if "delimiter" in record:
        return str(_get(record, ("delimiter",), str, where))
    return "" if not prompt or prompt[-1].isspace() or choice[0].isspace() else " "


def _answer(record: dict[str, Any], choices: list[str], where: str) -> int:
    """从 0 起的下标，或选项的原文；HellaSwag 的 label 是写成文字的下标。"""
    answer = _get(record, _ANSWER, (int, str), where)
    last = len(choices) - 1
    bad = f"{where}: the answer {answer!r} does not name one of the {len(choices)} choices: "
    if isinstance(answer, int):
        if not 0 <= answer <= last:
            raise ValueError(f"{bad}give a number from 0 to {last}")
        return answer
    named = {i: f"the text of choice {i}" for i, choice in enumerate(choices) if choice == answer}
    if answer.isascii() and answer.isdigit() and int(answer) <= last:
        named.setdefault(int(answer), f"the number of choice {int(answer)}")
    if len(named) > 1:
        both = " and ".join(named.values())
        raise ValueError(f"{bad}it is {both}; write the number without quotes")
    if not named:
        raise ValueError(f"{bad}give a number from 0 to {last}, or the text of one")
    return next(iter(named))


def _get(record: dict[str, Any], names: Sequence[str], kind: Any, where: str) -> Any:
    """names 里恰好有一个，且类型对。"""
    there = [name for name in names if name in record]
    wanted = " or ".join(map(repr, names))
    if not there:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"{where}: no key {wanted} (keys: {keys})")
    if len(there) > 1:
        raise ValueError(f"{where}: both {' and '.join(map(repr, there))} are there: leave one out")
    value = record[there[0]]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{where}: {there[0]!r} is {type(value).__name__}, expected {_NAMES[kind]}"
        )
    return value


def encode_request(
    tokenizer: Tokenizer, context: str, rest: str, context_size: int, where: str
) -> Request:
    """上文（末尾没有空白）与续文一起编码再切开；where 是错误里点名的出处。

    Raises:
        ValueError: 有词表之外的字符，或续文本身就放不进上下文。
    """
    try:
        before, whole = tokenizer.encode(context), tokenizer.encode(context + rest)
    except ValueError as error:
        raise ValueError(f"{where}: the model's tokenizer cannot encode it: {error}") from None
    # 词元跨过边界时（上文不以词尾结束），从第一个不同的词元起都算续文。
    same = [a == b for a, b in zip(before, whole, strict=False)] + [False]
    shared = same.index(False)
    prefix = whole[:shared] or [tokenizer.boundary_id]
    scored = len(whole) - shared
    if scored > context_size:
        raise ValueError(
            f"{where}: {rest[:40]!r} has {scored} tokens, more than context_size={context_size}: "
            "shorten it or leave the line out"
        )
    tokens = np.array(prefix + whole[shared:], dtype=np.int64)
    cut = max(0, len(tokens) - 1 - context_size)
    return Request(tokens[cut:], len(prefix) - cut, cut)


class ItemScore(NamedTuple):
    """各选项的负对数似然之和 (nat)；greedy：各选项的词元是否全是最可能的。"""

    nats: tuple[float, ...]
    greedy: tuple[bool, ...]


def score_items(
    model: GPT2Model, items: Sequence[Item], batch_size: int, tick: Callable[[int], object]
) -> Iterator[list[ItemScore]]:
    """按题的次序，每次一段；每批之后 tick(词元数)。batch_size 是一次前向的请求数，不改变结果。"""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    block: list[Item] = []
    for number, item in enumerate(items, start=1):
        block.append(item)
        requests = sum(len(one.requests) for one in block)
        if requests >= _BLOCK_BATCHES * batch_size or number == len(items):
            yield _score_block(model, block, batch_size, tick)
            block = []


def _score_block(
    model: GPT2Model, items: Sequence[Item], batch_size: int, tick: Callable[[int], object]
) -> list[ItemScore]:
    requests = [request for item in items for request in item.requests]
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    found: dict[int, tuple[float, bool]] = {}
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        batch = [requests[i] for i in chosen]
        scored = score_rows(model, [r.tokens for r in batch], [r.first for r in batch])
        for i, one in zip(chosen, scored, strict=True):
            found[i] = (math.fsum(one.nats), bool(one.greedy.all()))
        tick(sum(len(r.tokens) for r in batch))
    results, at = [], 0
    for item in items:
        mine = [found[at + i] for i in range(len(item.requests))]
        results.append(ItemScore(tuple(n for n, _ in mine), tuple(g for _, g in mine)))
        at += len(item.requests)
    return results


@dataclass(frozen=True)
class TaskResult:
    """前 items 道题的结果；cut 道题的上文被从左截短。"""

    items: int
    cut: int
    metrics: dict[str, Metric]


def summarize_task(task: Task, scores: Sequence[ItemScore]) -> TaskResult:
    """
    最后一个词：accuracy；perplexity = exp(每词 nat 的平均)，一个词不论几个词元。
    多项选择：acc 取对数似然之和最大的，acc_norm 先除以选项的字符数（lm-eval 的定义），
    acc_bytes 除以 UTF-8 字节数；chance 是瞎猜的期望。

    Raises:
        ValueError: 一道题也没做完。
    """
    if not scores:
        raise ValueError(f"{task.path}: no item was scored: there is nothing to summarise")
    items = task.items[: len(scores)]
    cut = sum(any(r.cut for r in item.requests) for item in items)
    if task.kind == "last word":
        metrics = {
            "accuracy": _mean([score.greedy[0] for score in scores]),
            "perplexity": _mean([score.nats[0] for score in scores]).exp(),
        }
        return TaskResult(len(items), cut, metrics)
    lengths: dict[str, Callable[[str], int]] = {
        "acc": lambda _: 1,
        "acc_norm": len,
        "acc_bytes": lambda text: len(text.encode("utf-8")),
    }
    metrics = {
        name: _mean(
            [_picks(item, score, length) for item, score in zip(items, scores, strict=True)]
        )
        for name, length in lengths.items()
    }
    metrics["chance"] = Metric(_mean([1 / len(item.choices) for item in items]).value, None)
    return TaskResult(len(items), cut, metrics)


def _picks(item: Item, score: ItemScore, length: Callable[[str], int]) -> bool:
    losses = [n / length(text) for n, text in zip(score.nats, item.choices, strict=True)]
    return losses.index(min(losses)) == item.answer


def _mean(values: Sequence[float]) -> Metric:
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Metric(mean, None)
    spread = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Metric(mean, math.sqrt(spread / count))

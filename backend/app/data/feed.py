"""一步一批：一个批次是 (数据, seed, 读过的行数) 的纯函数，续训只需要一个整数。

形状：B 批大小，T 上下文长度。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from app.data.batch import ALL, Batch, Rows
from app.data.feeding.examples import Examples, Pairs, Rowed
from app.data.feeding.plan import OneEach, Packed, Plan
from app.data.feeding.timeline import Timeline
from app.data.feeding.windows import Windows as Windows
from app.data.sampler import Sampler
from app.data.shards import TokenDataset

Score = Literal["auto", "all", "answers"]
Documents = Literal["joined", "apart"]


class Feed(Protocol):
    """训练怎样读数据；行不够一批的，以不计分的行补足，形状从不变。"""

    @property
    def context(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def rows_in_epoch(self) -> int:
        """读一遍数据要几行。"""

    def batch(self, step: int, rows: Rows = ALL) -> Batch:
        """第 step 批（从 0 起），或其中几行；任何划分读到的都是同一批。"""

    def windows(self, step: int) -> int:
        """做完 step 步时读过几行，补足的不算。"""

    def epoch(self, step: int) -> float:
        """到 step 为止读过几遍。"""

    def steps_of(self, epochs: float) -> int:
        """从头读这么多遍要几步，零头进一。"""

    def moved(self, step: int, windows: int) -> Feed:
        """同样的次序，但做完 step 步时已读过 windows 行：从那里接着读。"""

    def places(self, step: int) -> list[int]:
        """第 step 批各行从哪里读，给日志；补足的行是 -1。"""


def open_feed(
    dataset: TokenDataset,
    context: int,
    batch_size: int,
    seed: int,
    *,
    score: Score = "auto",
    pack: bool = False,
    documents: Documents = "joined",
    say: Callable[[str], object] = lambda _: None,
) -> Feed:
    """按数据的种类选读法；文本切成窗口，对话一例一行或几例一行，偏好成对。

    对话总是一例一例分开的，documents 只管文本。score="auto"：数据知道哪些计分，就只算那些。

    Raises:
        ValueError: 选项与数据的种类不合，或没有一例放得进上下文。
    """
    _check(dataset, batch_size, score, pack)
    if dataset.kind == "text":
        sampler = Sampler(dataset.n_tokens, context, batch_size, seed)
        return Windows(dataset, sampler, apart=documents == "apart")
    if context < 1 or batch_size < 1:
        raise ValueError(f"context={context} and batch_size={batch_size} must be at least 1")
    examples = Examples(dataset, answers=score != "all")
    fitting = _fitting(dataset, examples, context, say)
    if dataset.kind == "preference":
        both = fitting[: len(fitting) // 2 * 2].reshape(-1, 2).all(1)
        pairs = np.flatnonzero(both)
        _check_left(dataset, len(pairs), context)
        return Pairs(examples, OneEach(pairs, seed), context, Timeline(len(pairs), batch_size // 2))
    ids = np.flatnonzero(fitting)
    _check_left(dataset, len(ids), context)
    places = examples.lengths[ids] - 1
    plan: Plan = Packed(ids, places, context, seed) if pack else OneEach(ids, seed)
    say(
        f"{len(ids):,} examples in {plan.rows:,} rows of {context}: "
        f"{places.sum() / (plan.rows * context):.1%} of the places hold tokens"
    )
    return Rowed(examples, plan, context, Timeline(plan.rows, batch_size))


def _check(dataset: TokenDataset, batch_size: int, score: Score, pack: bool) -> None:
    kind, folder = dataset.kind, dataset.folder
    if kind == "text" and score == "answers":
        raise ValueError(
            f"score=answers, but {folder} is plain text, which has no answers: use score=all, or "
            "prepare conversations"
        )
    if kind == "text" and pack:
        raise ValueError(
            f"pack=true packs whole conversations, but {folder} is plain text: use documents=apart "
            "to keep its documents from seeing each other"
        )
    if kind == "preference":
        if pack or score == "all":
            raise ValueError(
                f"{folder} holds preference pairs, whose answers alone are scored, one a row: "
                f"leave pack={str(pack).lower()} and score={score} out"
            )
        if batch_size % 2:
            raise ValueError(
                f"batch_size={batch_size} is odd, but {folder} holds pairs of rows: make it even"
            )


def _fitting(
    dataset: TokenDataset, examples: Examples, context: int, say: Callable[[str], object]
) -> np.ndarray:
    """哪些例放得进一行：(N,) bool。"""
    fitting = (examples.lengths >= 2) & (examples.lengths <= context + 1)
    long = int((~fitting).sum())
    if long:
        warn = "warning: " if long > len(fitting) / 100 else ""
        say(
            f"{warn}{long:,} of {len(fitting):,} examples are longer than context={context} and "
            f"are left out ({dataset.folder}; `gpt2 prepare --long cut-prompt` shortens them)"
        )
    return fitting


def _check_left(dataset: TokenDataset, left: int, context: int) -> None:
    if not left:
        raise ValueError(
            f"{dataset.folder}: no example fits in context={context}: use a longer context, or "
            "prepare again with --long cut-prompt"
        )

"""缓存的孪生：每行记着自己的全部词元，注意力在 visible() 之上直接算，没有缓存。

每喂一块就逐位置比较；截断、换行、失败的前向、丢掉中段都在两边各做一遍。
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from app.models.transformer import KVCache
from app.models.transformer.visibility.positions import Positions
from app.models.transformer.visibility.rule import visible

from .helpers import tiny_config

TIGHT = 1e-12
# 每种容量、每种越界的可能都有一个：窗口 1，扩张，前缀，交，无界的一层。
PATTERNS = (
    "local(1)", "local(3)", "local(3, 2)", "sinks(2, 4)", "longformer(2, 3)",
    "strided(3) & local(6)", "global(2) | local(2)", "causal",
)  # fmt: skip
BOUNDED = PATTERNS[:-1]
UNPINNED = ("local(1)", "local(4)", "strided(2) & local(5)", "causal")


@pytest.fixture
def garbage_is_nan() -> Iterator[None]:
    """没有写过的内存一律是 NaN：读到了就藏不住。"""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cache_for(
    patterns: tuple[str, ...], rows: int, *, position: str = "none", **options
) -> KVCache:
    config = tiny_config(
        n_layer=len(patterns), attention_pattern=patterns, n_embed=16, n_head=2,
        position=position, context_size=1000,
    )  # fmt: skip
    return KVCache.for_model(config, rows, dtype=torch.float64, **options)


@dataclass(frozen=True)
class Token:
    """uid 决定 q、k、v。"""

    uid: int
    pos: int
    segment: int = 0
    marked: bool = False


@dataclass
class Twin:
    """缓存，以及它的直接写法。"""

    patterns: tuple[str, ...]
    cache: KVCache
    rows: list[list[Token]] = field(default_factory=list)
    made: int = 0
    # 键随位置而变，代替 RoPE：位置每加一，键加上 TURN。
    turning: bool = False

    def __post_init__(self) -> None:
        self.parsed = tiny_config(
            n_layer=len(self.patterns), attention_pattern=self.patterns
        ).patterns
        self.rows = self.rows or [[] for _ in range(self.cache.batch_size)]

    def qkv(self, layer: int, rows: list[list[Token]]) -> Tensor:
        """(3, B, 2, T, 8)；填充也取有限的数。"""
        uids = torch.tensor([[t.uid for t in row] for row in rows])
        values = QKV[layer, uids].permute(2, 0, 3, 1, 4).clone()
        if self.turning:
            pos = torch.tensor([[t.pos for t in row] for row in rows])
            values[1] += TURN * pos[:, None, :, None]
        return values

    def feed(
        self, real: list[list[bool]], positions: Positions | None = None, fail_at=None
    ) -> None:
        """真词元处 True；各行同宽。fail_at：在这一层之前失败。"""
        where = self.where(real) if positions is None else positions
        rows, width = len(real), len(real[0])
        pos = where.pos.expand(rows, -1).tolist()
        segment = (
            [[0] * width] * rows
            if where.segment is None
            else where.segment.expand(rows, -1).tolist()
        )
        marked = (
            [[False] * width] * rows
            if where.marked is None
            else where.marked.expand(rows, -1).tolist()
        )
        new: list[list[Token]] = []
        for i, row in enumerate(real):
            new.append([])
            for t, is_real in enumerate(row):
                self.made += 1
                uid = self.made if is_real else -1
                new[i].append(Token(uid, pos[i][t], segment[i][t], marked[i][t]))
        step = self.cache.begin(where)
        outputs = []
        for layer, pattern in enumerate(self.parsed):
            if layer == fail_at:
                return
            q, k, v = self.qkv(layer, new)
            k, v = step.write(layer, k, v)
            keys = step.keys(pattern)
            assert keys.length == k.shape[2]
            outputs.append(attend(q, k, v, visible(where, keys, pattern)))
        if fail_at is None:
            self.cache.commit(step)
            for i, row in enumerate(real):
                self.rows[i] += [t for t, is_real in zip(new[i], row, strict=True) if is_real]
                self.compare(i, row, outputs)
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]

    def where(self, real: list[list[bool]]) -> Positions:
        """与模型同样的归一：步调一致就用静态事实。"""
        mask, past = torch.tensor(real), self.cache.uniform
        if past is not None and mask.all():
            return Positions.plain(past, mask.shape[1], mask.device)
        return Positions.padded(mask.long(), self.cache.lengths[:, None])

    def compare(self, row: int, real: list[bool], outputs: list[Tensor]) -> None:
        all_tokens, n = self.rows[row], sum(real)
        if n == 0:
            return
        table = coordinates(all_tokens)
        late = Positions(table.pos[:, -n:], table.segment[:, -n:], marked=table.marked[:, -n:])
        for layer, pattern in enumerate(self.parsed):
            q, k, v = self.qkv(layer, [all_tokens])
            wanted = attend(q[:, :, -n:], k, v, visible(late, table, pattern))[0]
            got = outputs[layer][row][:, torch.tensor(real)]
            assert (got - wanted).abs().max() <= TIGHT, (layer, str(pattern))

    def truncate(self, lengths: list[int]) -> None:
        same = len(set(lengths)) == 1
        self.cache.truncate(lengths[0] if same else torch.tensor(lengths))
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]

    def evict(self, first: int, last: int) -> None:
        before = [len(row) for row in self.rows]
        dropped = self.cache.evict(first, last, turn_back if self.turning else None)
        for i, row in enumerate(self.rows):
            if len(row) > first + last:
                row = row[:first] + row[len(row) - last :]
            self.rows[i] = [replace(t, pos=pos) for pos, t in enumerate(row)]
        lengths = [len(row) for row in self.rows]
        assert self.cache.lengths.tolist() == lengths
        gone = dropped.tolist() if isinstance(dropped, Tensor) else [dropped] * len(before)
        assert gone == [a - b for a, b in zip(before, lengths, strict=True)]

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(torch.tensor(order))
        self.rows = [list(self.rows[i]) for i in order]


TURN = torch.linspace(-0.1, 0.1, 8, dtype=torch.float64)


def turn_back(k: Tensor, delta: Tensor) -> Tensor:
    return k - TURN * delta[:, None, None, None]


# (层, 词元, 3, 头, 宽)：每个词元在每层的 q、k、v。
QKV = torch.randn(
    len(PATTERNS), 3000, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)


def coordinates(row: list[Token]) -> Positions:
    return Positions(
        torch.tensor([[t.pos for t in row]]),
        torch.tensor([[t.segment for t in row]]),
        marked=torch.tensor([[t.marked for t in row]]),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~seen[:, None], -1e9).softmax(-1)
    return scores.masked_fill(~seen[:, None], 0.0) @ v


def full(rows: int, width: int) -> list[list[bool]]:
    return [[True] * width for _ in range(rows)]


def pads(rng: random.Random, rows: int, width: int) -> list[list[bool]]:
    """左、右或两侧填充，各行长短不一，可以整行都是填充。"""
    result = []
    for _ in range(rows):
        low, high = sorted((rng.randint(0, width), rng.randint(0, width)))
        result.append([low <= t < high for t in range(width)])
    return result


@contextmanager
def suppress_refusal() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        assert "cannot truncate" in str(error) or "no longer holds" in str(error)

"""谁来猜：同一段里抄，或一个小模型写。猜得对不对由引擎验，所以这里只管快慢。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from torch import Tensor

from app.generation.sampling import NOT_FINITE
from app.models.transformer.cache.row_cache import Span
from app.serving.costs import measure
from app.serving.draws import draw
from app.serving.flat_step import FlatStep
from app.serving.request import Ask
from app.serving.running import Running


class Drafter(Protocol):
    """seconds：每猜一个词元要多久，与验的时间分开算。"""

    name: str
    seconds: float

    def draft(self, wanted: Sequence[tuple[Running, int]]) -> dict[int, list[int]]:
        """[(一段, 至多几个)] -> {行: 草稿}；草稿可以短，也可以没有。"""


class NGramDrafter:
    """见 speculate.NGrams。"""

    name, seconds = "ngram", 0.0

    def draft(self, wanted: Sequence[tuple[Running, int]]) -> dict[int, list[int]]:
        return {
            run.row: run.grams.draft(run.tokens, size)
            for run, size in wanted
            if run.row is not None and size > 0
        }


@dataclass
class _Ahead:
    """走在前面 ahead 步的一段：惩罚仍照它此刻的，只是猜得差一点。"""

    run: Running
    ahead: int

    @property
    def ask(self) -> Ask:
        return self.run.ask

    @property
    def counts(self) -> dict[int, int]:
        return self.run.counts

    @property
    def uniforms(self) -> Tensor | None:
        return self.run.uniforms

    @property
    def seen(self) -> Tensor | None:
        return self.run.seen

    @property
    def made(self) -> int:
        return self.run.made + self.ahead


class DraftModel:
    """小模型：自己的缓存，行号与大模型的相同。

    它用大模型那一步的同一个均匀数、同一个采样器来抽：两边的分布越近，抽到的越常相同。各自另抽则
    接受率低得多（合成的分布上 .86/.63 对 .62/.30）。
    """

    name = "draft model"

    def __init__(self, flat: FlatStep, width: int) -> None:
        """width: 大模型可选的词元数；分词器要相同。"""
        self._flat, self._width = flat, width
        self.seconds = measure(flat).seconds(1)
        # 各行缓存里是哪些词元。
        self._held: list[list[int]] = [[] for _ in range(flat.cache.rows)]

    def draft(self, wanted: Sequence[tuple[Running, int]]) -> dict[int, list[int]]:
        going = {run.row: (run, size) for run, size in wanted if run.row is not None and size > 0}
        found: dict[int, list[int]] = {row: [] for row in going}
        ahead = 0
        while going:
            texts = {row: run.tokens + found[row] for row, (run, _) in going.items()}
            rows, logits = self._catch_up(texts)
            if logits is None:
                break
            tokens = draw(logits, [_Ahead(going[row][0], ahead) for row in rows])
            ahead += 1
            good = [pair for pair in zip(rows, tokens, strict=True) if pair[1] != NOT_FINITE]
            for row, token in good:
                found[row].append(token)
            going = {row: going[row] for row, _ in good if ahead < going[row][1]}
        return found

    def _catch_up(self, texts: Mapping[int, list[int]]) -> tuple[list[int], Tensor | None]:
        """各行的缓存追向 texts，一次至多 max_chunk 个词元，差得少的先；换过人的行从相同处接着。

        返回 (追上了的行, 它们最后一个词元的 logits (K, V))；没追上的下一步接着追，先不猜。
        """
        cache, room = self._flat.cache, self._flat.cache.max_chunk
        new: dict[int, list[int]] = {}
        for row, text in texts.items():
            pairs = zip(self._held[row], text[:-1], strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            cache.truncate(row, same)
            del self._held[row][same:]
            new[row] = text[same:]
        spans, ids, ready, keep = list[Span](), list[int](), list[int](), list[int]()
        fed: dict[int, list[int]] = {}
        for row in sorted(new, key=lambda row: len(new[row])):
            fed[row] = new[row][:room]
            room -= len(fed[row])
        for row in sorted(row for row in fed if fed[row]):
            spans.append(Span(row, len(fed[row])))
            ids += fed[row]
            if len(fed[row]) == len(new[row]):
                ready.append(row)
                keep.append(len(ids) - 1)
        logits = self._flat(ids, spans, keep)
        # 走完了才算数：中途失败，缓存里没有它们。
        for row, some in fed.items():
            self._held[row] += some
        return ready, None if logits is None else logits[:, : self._width]

"""一段正在写的文字：收下词元，认出结尾，攒着可以送出的。"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from app.data.tokenizers import StreamDecoder, Tokenizer
from app.generation.sampling import uniforms
from app.generation.stopping import StopText
from app.serving.request import Ask, Event, Scored
from app.serving.speculate import Gain, NGrams


class Running:
    """order、index：哪一次请求的第几段。row：占着缓存的哪一行，排队时为 None。

    Attributes:
        tokens: 提示与已写的；缓存追着它走。
        counts、seen、uniforms: 见 draws.Drawing。
    """

    def __init__(self, order: int, index: int, ask: Ask, tokenizer: Tokenizer, width: int) -> None:
        self.order, self.index, self.ask = order, index, ask
        self.tokens = list(ask.prompt)
        self.row: int | None = None
        self.finish: Literal["stop", "length"] | None = None
        self.scores: list[Scored] = []
        self.cached = self.waited = 0
        self.since = 0.0
        self.grams, self.gain = NGrams(), Gain()
        self.counts: dict[int, int] = {}
        greedy = ask.sampling.greedy
        self.uniforms = None if greedy else uniforms([ask.seed], ask.max_tokens)[0]
        self.seen: Tensor | None = None
        if ask.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(width, dtype=torch.bool)
            self.seen[list(set(ask.prompt))] = True
        self._decoder, self._stop = StreamDecoder(tokenizer), StopText(ask.stop_strings)
        self._reason: str | int | None = None
        self._fed = 0
        self._ready, self._waiting = "", list[Scored]()
        self._told_prompt = False

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.ask.prompt)

    @property
    def left(self) -> int:
        """还可以写几个。"""
        return self.ask.max_tokens - self.made

    def accept(self, scored: Scored) -> None:
        """收下一个词元；写完了就有 finish。"""
        token, ask = scored.id, self.ask
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.seen is not None:
            self.seen[token] = True
        self._waiting.append(replace(scored, at=self._fed))
        if token in ask.stop_ids:
            self._end("stop", token)
            return
        piece = self._decoder.push([token])
        self._fed += len(piece)
        # 还不许停的时候，停止串也不算数。
        self._ready += piece if self.made < ask.min_tokens else self._stop.feed(piece)
        if self._stop.stopped:
            self._end("stop", self._stop.matched)
        elif self.left == 0:
            self._end("length", None)

    def close(self) -> None:
        """一个词元也不写（max_tokens=0）。"""
        self._end("length", None)

    def event(self) -> Event | None:
        """可以送出的；没有就 None。词元跟着它的文字走，文字压着，词元也压着。"""
        first = () if self._told_prompt else tuple(self.scores)
        if not (self._ready or self.finish or first):
            return None
        self._told_prompt = True
        text, self._ready = self._ready, ""
        tokens: list[Scored] = []
        if text or self.finish:
            tokens, self._waiting = self._waiting, []
        return Event(
            self.order, self.index, text, tuple(tokens), self.finish, self._reason, first,
            self.cached,
        )  # fmt: skip

    def _end(self, finish: Literal["stop", "length"], reason: str | int | None) -> None:
        if not self._stop.stopped:
            self._ready += self._stop.close(self._decoder.finish())
            if self._stop.stopped and finish == "length":
                # 解码器里剩下的也可能凑成一个停止串。
                finish, reason = "stop", self._stop.matched
        self.finish, self._reason = finish, reason

"""一行的进度：收下词元，认出结尾，告诉在听的人。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from app.data.tokenizers import StreamDecoder, Tokenizer
from app.generation.config import Options
from app.generation.stopping import StopText

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """一行的结果。

    Attributes:
        tokens: 新词元，不含停止词元；停止串使文本被切断时，只到切口之前的整词元。
        finish: "stop" 遇到停止词元或停止串；"length" 到了 max_new_tokens。
        text: 新文本，在停止串之前切断；没有给 tokenizer 时为 None。
    """

    tokens: list[int]
    finish: Finish
    text: str | None


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """生成途中要听的事；行从 0 数起。

    Attributes:
        on_token: (行, 词元) 每选出一个就调用，不含停止词元。
        on_text: (行, 文本) 可以显示的文本；可能是停止串开头的部分先压住。要有分词器。
        on_finish: (行, 结果) 一行结束时调用。
    """

    on_token: Callable[[int, int], object] | None = None
    on_text: Callable[[int, str], object] | None = None
    on_finish: Callable[[int, Completion], object] | None = None


class Row:
    """一行。prompt 是它的提示；finish 在结束之前是 None。"""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        options: Options,
        tokenizer: Tokenizer | None,
        calls: Callbacks,
    ) -> None:
        self.prompt = prompt
        self.finish: Finish | None = None
        self._index, self._calls, self._limit = index, calls, options.max_new_tokens
        self._stop_ids = frozenset(options.stop_ids)
        self._side = None if tokenizer is None else _TextSide(tokenizer, options.stop_strings)
        self._tokens: list[int] = []

    def accept(self, token: int) -> None:
        if token in self._stop_ids:
            self._end("stop")
            return
        self._tokens.append(token)
        if self._calls.on_token:
            self._calls.on_token(self._index, token)
        if self._side is not None:
            self._show(self._side.feed(token))
            if self._side.stop.stopped:
                self._end("stop")
                return
        if len(self._tokens) == self._limit:
            self._end("length")

    def history(self) -> list[int]:
        return [*self.prompt, *self._tokens]

    def completion(self) -> Completion:
        assert self.finish is not None
        if self._side is None:
            return Completion(self._tokens, self.finish, None)
        return Completion(
            self._tokens[: self._side.stop.kept_tokens()], self.finish, self._side.text
        )

    def _end(self, finish: Finish) -> None:
        if self._side is not None and not self._side.stop.stopped:
            self._show(self._side.close())
            # 解码器里剩下的文本也可能凑成一个停止串。
            finish = "stop" if self._side.stop.stopped else finish
        self.finish = finish
        if self._calls.on_finish:
            self._calls.on_finish(self._index, self.completion())

    def _show(self, piece: str) -> None:
        if piece and self._calls.on_text:
            self._calls.on_text(self._index, piece)


class _TextSide:
    """一行的文字一侧：流式解码，再过停止串。"""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self.stop = StreamDecoder(tokenizer), StopText(stops)
        self._pieces: list[str] = []

    def feed(self, token: int) -> str:
        return self._keep(self.stop.feed(self._decoder.push([token])))

    def close(self) -> str:
        return self._keep(self.stop.close(self._decoder.finish()))

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece

"""与模型的一段对话：词元与训练时的相同，上下文满了丢最早的几轮，并说丢了哪些。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from app.data.chat.encode import Encoder, Turn
from app.data.chat.template import Template
from app.data.tokenizers import Tokenizer
from app.generation.config import Options
from app.generation.generate import complete
from app.generation.row import Callbacks, Finish
from app.models.transformer import GPT2Model

Ended = Finish | Literal["interrupted"]
SYSTEM, USER = "system", "user"


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        ended: "stop" 模型自己收的尾；"length" 到了长度；"interrupted" 被 Ctrl-C 打断。
        dropped: 为放得下而忘掉的问与答，最早的在前。
    """

    text: str
    ended: Ended
    dropped: tuple[Turn, ...]


class Conversation:
    """
    Attributes:
        turns: 问与答相间，不含 system。
    """

    def __init__(
        self,
        model: GPT2Model,
        tokenizer: Tokenizer,
        template: Template,
        options: Options,
        system: str | None = None,
    ) -> None:
        """options.max_new_tokens 是一个回答的上限；不到它也留得下问题才开口。

        Raises:
            ValueError: 分词器没有模板要的特殊词元，模板没有 system，或 system 写不出。
        """
        self._model, self._tokenizer = model, tokenizer
        self._encoder = Encoder(template, tokenizer)
        stops = (*template.stop_ids(tokenizer), *tokenizer.stop_ids)
        self._options = replace(options, stop_ids=tuple(dict.fromkeys(stops)))
        self._head = [] if system is None else [Turn(SYSTEM, system)]
        self._answerer = template.answerer
        self.turns: list[Turn] = []
        self.prompt()

    def prompt(self) -> list[int]:
        """轮到模型说话时喂给它的词元。"""
        return self._encoder.prompt([*self._head, *self.turns])

    def ask(self, text: str, seed: int, on_text: Callable[[str], object]) -> Answer:
        """on_text 边写边收到文字；其中抛出的 KeyboardInterrupt 停下这个回答，写了的留着。

        Raises:
            ValueError: 问题写不出，或它自己就放不下；这时对话不变。
        """
        before = list(self.turns)
        self.turns.append(Turn(USER, text))
        try:
            ids, dropped = self._fitting()
            answer, ended = self._complete(ids, seed, on_text)
        except ValueError:
            self.turns = before
            raise
        self.turns.append(Turn(self._answerer, answer))
        return Answer(answer, ended, dropped)

    def _complete(
        self, ids: list[int], seed: int, on_text: Callable[[str], object]
    ) -> tuple[str, Ended]:
        pieces: list[str] = []

        def heard(_: int, piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        room = self._model.config.context_size - len(ids)
        options = replace(self._options, max_new_tokens=min(self._options.max_new_tokens, room))
        try:
            (done,) = complete(
                self._model, [ids], options, tokenizer=self._tokenizer, seeds=[seed],
                names=["the conversation"], calls=Callbacks(on_text=heard),
            )  # fmt: skip
        except KeyboardInterrupt:
            return "".join(pieces), "interrupted"
        return "".join(pieces), done.finish

    def undo(self) -> bool:
        """忘掉最后一问一答；没有则 False。"""
        had = bool(self.turns)
        del self.turns[-2:]
        return had

    def reset(self) -> None:
        self.turns = []

    def _fitting(self) -> tuple[list[int], tuple[Turn, ...]]:
        """给回答留出地方；不够就从最早的一问一答丢起。"""
        context = self._model.config.context_size
        # 回答的上限可以大于上下文；至少留四分之一，答得完一句话。
        needed = min(self._options.max_new_tokens, max(1, context // 4))
        dropped: list[Turn] = []
        while len(ids := self.prompt()) + needed > context and len(self.turns) > 1:
            dropped += self.turns[:2]
            del self.turns[:2]
        if len(ids) >= context:
            raise ValueError(
                f"this message alone is {len(ids)} tokens with its system text, but the context "
                f"is {context}: say it shorter"
            )
        return ids, tuple(dropped)

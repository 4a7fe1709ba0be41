"""对话 -> 词元，与哪些计分：各段分开编码再相接，界线因此总落在词元之间。

把提问与回答连起来编码（TRL 的做法）时，界线上的词元可能一半属于提问；这里没有这种词元。训练
与生成走同一条路：encode_prompt 就是整段对话的前一截。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from app.data.chat.template import Part, Special, Template
from app.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Turn:
    """一句话；scored=False：即使是回答也不计分。"""

    role: str
    content: str
    scored: bool = True


@dataclass(frozen=True)
class Piece:
    """一段单独编码的文字，或一个特殊词元；turn：是第几句话的内容，模板自己的文字是 None。"""

    part: Part
    scored: bool
    turn: int | None = None


class Encoder:
    """一个模板配一个分词器。

    Raises:
        ValueError: 分词器没有模板要的特殊词元。
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        template.check(tokenizer)
        self.template, self.tokenizer = template, tokenizer
        # 模板自己的文字只有几种
        self._fixed = cache(self._text)

    def conversation(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """(各词元, 计不计分)：(n,) uint32 与 (n,) bool。"""
        return self.encoded(self.pieces(turns))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """轮到模型说话时的词元，等于 conversation([*turns, 回答]) 的开头。"""
        role = self.template.roles[self.template.answerer]
        parts = [*self._parts(turns), *(Piece(part, scored=False) for part in role.before)]
        ids, _ = self.encoded(_joined(parts))
        return [int(i) for i in ids] or [self.tokenizer.boundary_id]

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        return _joined(self._parts(turns))

    def encoded(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        return marked(self.arrays(pieces), pieces)

    def arrays(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """各段的词元。"""
        result, fresh = [], True
        for piece in pieces:
            if isinstance(piece.part, Special):
                number = self.tokenizer.special_tokens[piece.part.text]
                result.append(np.array([number], dtype=np.uint32))
                continue
            encode = self._fixed if piece.turn is None else self._text
            result.append(encode(piece.part, fresh))
            fresh = fresh and not piece.part
        return result

    def _text(self, text: str, fresh: bool) -> np.ndarray:
        """fresh：一段对话最先的文字；其余的接在别的文字之后，开头不补空格。"""
        batch = self.tokenizer.encode_batch if fresh else self.tokenizer.encode_continued
        return batch([text])[0]

    def _parts(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        for text in self.template.start:
            yield Piece(Special(text), scored=False)
        for number, turn in enumerate(turns):
            role = self.template.roles.get(turn.role)
            if role is None:
                raise ValueError(
                    f"role {turn.role!r} is not one of the template's "
                    f"({', '.join(self.template.roles)}): rename it or leave the turn out"
                )
            yield from (Piece(part, scored=False) for part in role.before)
            scored = role.scored and turn.scored
            yield Piece(turn.content, scored, number)
            for part in role.after:
                yield Piece(part, scored)
                # 收尾的记号计分，其后的换行不计
                scored = scored and not (
                    isinstance(part, Special) and part.text in self.template.stop
                )


def encode_conversation(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    return Encoder(template, tokenizer).conversation(turns)


def encode_prompt(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer) -> list[int]:
    return Encoder(template, tokenizer).prompt(turns)


def marked(arrays: Sequence[np.ndarray], pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """各段的词元相接，与它们计不计分。"""
    ids = np.concatenate([np.empty(0, dtype=np.uint32), *arrays])
    marks = [np.full(len(a), p.scored) for a, p in zip(arrays, pieces, strict=True)]
    return ids, np.concatenate([np.empty(0, dtype=bool), *marks])


def _joined(pieces: Iterator[Piece] | Sequence[Piece]) -> list[Piece]:
    """相邻的模板文字合成一段：它们从不随用户的话变，合起来编码与 transformers 的相同。"""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            last is not None
            and isinstance(piece.part, str)
            and isinstance(last.part, str)
            and piece.turn is None
            and last.turn is None
            and piece.scored == last.scored
        ):
            result[-1] = Piece(last.part + piece.part, piece.scored)
        elif piece.part != "":
            result.append(piece)
    return result

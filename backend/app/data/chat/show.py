"""给人看的词元：一例一行，计分的着色；不能着色的地方括在花括号里。"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from app.data.shards import TokenDataset
from app.data.tokenizers import Tokenizer

_SCORED, _END = "\x1b[1;32m", "\x1b[0m"
# 文本的一篇可能有整本书那么长
_MOST = 2000


def shown(dataset: TokenDataset, count: int, colour: bool) -> Iterator[str]:
    """前 count 例，词元之间是 |。"""
    tokenizer = dataset.tokenizer()
    borders = [*dataset.document_starts[: count + 1].tolist(), dataset.n_tokens]
    for start, end in list(zip(borders, borders[1:], strict=False))[:count]:
        length = min(end - start, _MOST)
        marks = dataset.scored(start, length)
        # 例的第一个词元没有谁预测它
        marks[0] = False
        yield _line(dataset.read(start, length), marks, tokenizer, colour) + (
            f"|... {end - start - length:,} more" if length < end - start else ""
        )


def _line(ids: np.ndarray, marks: np.ndarray, tokenizer: Tokenizer, colour: bool) -> str:
    opening, closing = (_SCORED, _END) if colour else ("{", "}")
    borders = np.flatnonzero(np.diff(marks, prepend=marks[0])).tolist()
    runs = []
    for start, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        text = "|".join(_text(tokenizer.token_bytes(int(i))) for i in ids[start:end])
        runs.append(f"{opening}{text}{closing}" if marks[start] else text)
    return "|".join(runs)


def _text(token: bytes) -> str:
    r"""换行写成 \n，控制字符与半个字符写成 \xNN：终端看到的就是词元。"""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )

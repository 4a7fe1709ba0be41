"""模型自己收不收得了尾：验证集里的几个问题，贪心地答，数答完的与一字不差的。

只看损失看不出不会停的模型：结尾的记号若没有计分，损失照样好看。自带种子，不动训练的随机数。
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.data.shards import TokenDataset
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.generation.row import Completion
from app.models.transformer import GPT2Model

from ..config import TrainConfig
from ..machine.runtime import Runtime

MOST = 20
_SHOWN = 3
# 看这么多例就够挑：验证集可以有几十万例。
_LOOKED = 200
_SLACK = 8


@dataclass(frozen=True)
class Question:
    """最后一个回答之前的词元，与那个回答（连同收尾的记号）。"""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Answers:
    """均匀取的至多 MOST 个问题；偏好数据只取选中的那一边。

    Args:
        tokens: 至多答这么多个；本该更长的多些。
    """

    def __init__(self, data: TokenDataset, context: int, tokens: int) -> None:
        self._tokenizer, template = data.tokenizer(), data.template()
        stops = (*template.stop_ids(self._tokenizer), *self._tokenizer.stop_ids)
        self._stops = tuple(dict.fromkeys(stops))
        found = list(_some(data, context))
        longest = max((len(one.answer) for one in found), default=0) + _SLACK
        self.limit = min(max(tokens, longest), max(1, context // 2))
        fitting = [one for one in found if len(one.prompt) + self.limit <= context]
        pick = np.linspace(0, len(fitting) - 1, min(len(fitting), MOST)).astype(int)
        self.questions = [fitting[i] for i in pick.tolist()]

    def row(self, model: GPT2Model, runtime: Runtime) -> dict[str, Any]:
        """{asked, ended, exact, limit, shown}。"""
        options = Options(
            max_new_tokens=self.limit, sampling=SamplingConfig(temperature=0.0),
            stop_ids=self._stops,
        )  # fmt: skip
        prompts = [one.prompt for one in self.questions]
        # 生成的形状一步一变，编译只会反复重来。种子贪心时用不到，但不给就会取走训练的随机数。
        with torch.compiler.set_stance("force_eager"), runtime.autocast():
            done = complete(
                model, prompts, options, tokenizer=self._tokenizer, seeds=[0] * len(prompts)
            )
        both = list(zip(done, self.questions, strict=True))
        return {
            "asked": len(both),
            "ended": sum(one.finish == "stop" for one, _ in both),
            "exact": sum(self._exact(one, to) for one, to in both),
            "limit": self.limit,
            "shown": [
                {"asked": self._tokenizer.decode(to.prompt), "said": one.text, "by": one.finish}
                for one, to in both[:_SHOWN]
            ],
        }

    def _exact(self, one: Completion, to: Question) -> bool:
        wanted = tuple(itertools.takewhile(lambda i: i not in self._stops, to.answer))
        return one.finish == "stop" and tuple(one.tokens) == wanted


def _some(data: TokenDataset, context: int) -> Iterator[Question]:
    """均匀的至多 _LOOKED 例里，整个放得下的。"""
    step = 2 if data.kind == "preference" else 1
    starts = np.append(np.asarray(data.document_starts), data.n_tokens)
    count = (len(starts) - 1) // step
    for number in np.linspace(0, count - 1, min(count, _LOOKED)).astype(int).tolist():
        start, stop = (int(i) for i in starts[number * step : number * step + 2])
        if stop - start > context:
            continue
        ids, scored = data.read(start, stop - start), data.scored(start, stop - start)
        begins = np.flatnonzero(scored & ~np.append(False, scored[:-1]))
        if len(begins) and begins[-1] > 0:
            first, end = int(begins[-1]), int(np.flatnonzero(scored)[-1]) + 1
            yield Question(tuple(ids[:first].tolist()), tuple(ids[first:end].tolist()))


def answers_of(sets: Iterable[TokenDataset], config: TrainConfig) -> Answers | None:
    """第一个验证集的；那里没有对话模板（文本）、不写样文，或没有一个问题放得下，就没有。"""
    first = next(iter(sets), None)
    if first is None or first.meta.get("chat") is None or not config.sample_tokens:
        return None
    found = Answers(first, config.model.context_size, config.sample_tokens)
    return found if found.questions else None


def answers_line(row: Mapping[str, Any]) -> str:
    return (
        f"answers: {row['ended']} of {row['asked']} ended by themselves within {row['limit']} "
        f"tokens, {row['exact']} exactly as in the validation data"
    )

"""下一个词元的交叉熵；只有计分的目标（全部，或只有回答）。"""

from __future__ import annotations

from typing import ClassVar

from app.data.batch import Batch
from app.models.transformer import GPT2Model

from .objective import Rows, Scored, count_scored, forward


class LanguageModel:
    names: ClassVar[tuple[str, ...]] = ()

    def weight(self, batch: Batch) -> int:
        return count_scored(batch.targets)

    def score(self, model: GPT2Model, rows: Rows) -> Scored:
        out = forward(model, rows)
        return Scored(out["loss"], out)

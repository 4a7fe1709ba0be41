"""DPO 开始（或续上）之前：参考的对数概率找来，或算出来，交给各数据集的读法。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from app.common.tell import Tell
from app.data.tokenizers import Tokenizer
from app.distributed.comm import Ranks
from app.models.transformer import GPT2Model

from .config import TrainConfig
from .machine.runtime import Runtime
from .objectives.build import load_other
from .objectives.reference import log_probs, reference_key, store, stored
from .opened import Data, feed_of
from .saving.initial import initialize_from


@dataclass(frozen=True)
class Known:
    """
    Attributes:
        key: 哪个参考；记进检查点，续训时照它找。
        log_probs: {数据集的指纹: (N,)}。
    """

    key: str
    log_probs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Comparer:
    config: TrainConfig
    runtime: Runtime
    tokenizer: Tokenizer
    world: Ranks
    tell: Tell

    def find(self, data: Data, model: GPT2Model | None, key: str | None) -> Known:
        """
        Args:
            model: 刚从 init_from 起的模型，就是参考；续训时没有，要算就再装一个。
            key: 检查点记着的。

        Raises:
            ValueError: 续训时参考已不是原来的那个。
        """
        config = self.config
        if config.objective.reference != "auto":
            model = None
        if key is None:
            model = self._model() if model is None else model
            key = reference_key(model, self.runtime, config.model.context_size)
        found = {}
        for part in (data.train, *data.val.values()):
            if part.kind != "preference":
                continue
            known = self.world.first(partial(stored, part, key))
            if known is None:
                model = self._same(key) if model is None else model
                self.tell(
                    f"reference: {len(part.document_starts):,} answers of {part.folder}, once"
                )
                feed = feed_of(part, config, config.rows_at_once, 0)
                known = log_probs(model, feed, config.rows_at_once, self.runtime, self.world)
                self.world.first(partial(store, part, key, known, self.tell))
            found[part.fingerprint] = known
        return Known(key, found)

    def _same(self, key: str) -> GPT2Model:
        model = self._model()
        now = reference_key(model, self.runtime, self.config.model.context_size)
        if now != key:
            raise ValueError(
                f"the checkpoint was compared with the reference {key} but objective.reference="
                f"{self.config.objective.reference} (init_from={self.config.init_from}) is now "
                f"{now}: put the same weights back, or start a new run"
            )
        return model

    def _model(self) -> GPT2Model:
        config, name = self.config, self.config.objective.reference
        if name != "auto":
            model = load_other(name, "objective.reference", config, self.tokenizer, self.tell)
            return model.to(self.runtime.device)
        assert config.init_from is not None
        model = GPT2Model(config.model).to(self.runtime.device)
        initialize_from(config.init_from, model, self.tokenizer, self.tell)
        return model

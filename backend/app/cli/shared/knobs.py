"""怎样从分布里选词元：generate 与 chat 的同样几个选项。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from typing_extensions import Doc

from app.generation.config import SamplingConfig
from app.models.transformer.cache.kv_dtype import KVDtype


@dataclass(frozen=True, kw_only=True)
class Knobs:
    temperature: Annotated[float, Doc("0 = greedy; below 1 = safer, above 1 = wilder")] = 0.8
    top_k: Annotated[int | None, Doc("keep the k most likely tokens")] = None
    top_p: Annotated[
        float | None, Doc("keep the smallest set of tokens with this much probability")
    ] = 0.95
    min_p: Annotated[
        float | None, Doc("drop tokens below this fraction of the likeliest one's probability")
    ] = None
    repetition_penalty: Annotated[float, Doc("above 1 = fewer repetitions, 1 = off")] = 1.0
    greedy: Annotated[bool, Doc("always the likeliest token: temperature 0")] = False
    kv_dtype: Annotated[
        KVDtype,
        Doc("int8 = smaller cache of keys and values, rounded; None = the model's own type"),
    ] = None

    def sampling(self) -> SamplingConfig:
        """
        Raises:
            ValueError: 选项的值不对。
        """
        return SamplingConfig(
            temperature=0.0 if self.greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

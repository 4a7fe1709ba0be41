"""怎样从分布里选词元：generate 与 chat 的同样几个选项、同样的说明。"""

from __future__ import annotations

from typing import Annotated, Protocol

from typing_extensions import Doc

from app.generation.config import SamplingConfig
from app.models.transformer.cache.kv_dtype import KVDtype

Temperature = Annotated[float, Doc("0 = greedy; below 1 = safer, above 1 = wilder")]
TopK = Annotated[int | None, Doc("keep the k most likely tokens")]
TopP = Annotated[float | None, Doc("keep the smallest set of tokens with this much probability")]
MinP = Annotated[
    float | None, Doc("drop tokens below this fraction of the likeliest one's probability")
]
RepetitionPenalty = Annotated[float, Doc("above 1 = fewer repetitions, 1 = off")]
Greedy = Annotated[bool, Doc("always the likeliest token: temperature 0")]
CachedAs = Annotated[
    KVDtype,
    Doc("int8 = smaller cache of keys and values, rounded; None = the model's own type"),
]


class Knobs(Protocol):
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def greedy(self) -> bool: ...


def sampling(args: Knobs) -> SamplingConfig:
    """
    Raises:
        ValueError: 选项的值不对。
    """
    return SamplingConfig(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )

"""旋转位置编码的设置。不需要 torch。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from .fields import from_mapping, normalise_types

RoPELayout = Literal["half", "interleaved"]
RoPEScaling = Literal["none", "linear", "ntk", "yarn"]
_LONGEST = 10_000_000


@dataclass(frozen=True, kw_only=True)
class RoPEConfig:
    """旋转位置编码（Su et al. 2021, arXiv:2104.09864）及其外推。

    Raises:
        ValueError: 值越界，或 scaling 与 factor 互相矛盾。
    """

    theta: Annotated[float, Doc("base of the frequencies; longer contexts use 500000")] = 10_000.0
    layout: Annotated[RoPELayout, Doc("which pairs rotate: half (Llama), interleaved (GPT-J)")] = (
        "half"
    )
    scaling: Annotated[RoPEScaling, Doc("how positions beyond the context are reached")] = "none"
    factor: Annotated[float, Doc("how many times longer than original_context")] = 1.0
    original_context: Annotated[
        int | None, Doc("context before scaling (yarn); None = context_size")
    ] = None

    def __post_init__(self) -> None:
        normalise_types(self, "rope.")
        if self.theta <= 1.0:
            raise ValueError(f"rope.theta={self.theta} must be above 1 (10000 is usual)")
        if self.scaling == "none" and self.factor != 1.0:
            raise ValueError(
                f"rope.factor={self.factor} has no effect with rope.scaling='none': "
                "use rope.factor=1 or a scaling (linear, ntk, yarn)"
            )
        if self.scaling != "none" and self.factor <= 1.0:
            raise ValueError(
                f"rope.scaling={self.scaling!r} with rope.factor={self.factor} stretches nothing: "
                "use rope.factor above 1, or rope.scaling='none'"
            )
        if self.original_context is None:
            return
        if self.scaling != "yarn":
            raise ValueError(
                f"rope.original_context={self.original_context} has no effect with "
                f"rope.scaling={self.scaling!r}: use None, or rope.scaling='yarn'"
            )
        if not 1 <= self.original_context <= _LONGEST:
            raise ValueError(
                f"rope.original_context={self.original_context} must be between 1 and {_LONGEST}"
            )

    @classmethod
    def from_dict(cls, data: Any) -> RoPEConfig:
        """
        Raises:
            ValueError: 不是映射、未知的键（给出最近的名字），或坏值。
        """
        return from_mapping(cls, data, "rope")

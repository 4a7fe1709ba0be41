"""tune 一节：哪些权重要训练；放在最下层，适配器与训练都读它。不需要 torch。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from typing_extensions import Doc

from .fields import nearest, normalise_types

LORA_TARGETS = ("qkv", "out", "up", "down")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """全部；LoRA（Hu et al. 2021, arXiv:2106.09685）；最后 K 层；输出头；或点名。"""

    trainable: Annotated[
        str, Doc("all, lora, last:K (the last K layers), head, or names with * by commas")
    ] = "all"
    lora_rank: Annotated[int, Doc("width of each adapter")] = 8
    lora_alpha: Annotated[float, Doc("an adapter counts lora_alpha / lora_rank times")] = 16.0
    lora_dropout: Annotated[float, Doc("dropout before each adapter")] = 0.0
    lora_targets: Annotated[
        tuple[str, ...], Doc("matrices that get an adapter: qkv, out, up, down")
    ] = LORA_TARGETS

    def __post_init__(self) -> None:
        normalise_types(self, "tune.")
        if not all(part.strip() for part in self.trainable.split(",")):
            raise ValueError(
                f"tune.trainable={self.trainable!r} has an empty name: use all, lora, last:K, "
                "head, or names by commas"
            )
        kind, colon, count = self.trainable.partition(":")
        if colon and (kind != "last" or not count.isdecimal() or int(count) < 1):
            raise ValueError(
                f"tune.trainable={self.trainable!r}: after 'last:' comes the number of layers, "
                "1 or more, as in last:2"
            )
        if self.lora_rank < 1:
            raise ValueError(f"tune.lora_rank={self.lora_rank} must be at least 1")
        if self.lora_alpha <= 0:
            raise ValueError(f"tune.lora_alpha={self.lora_alpha} must be above 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"tune.lora_dropout={self.lora_dropout} must be in [0, 1)")
        if not self.lora_targets:
            raise ValueError(f"tune.lora_targets is empty: name some of {list(LORA_TARGETS)}")
        for name in self.lora_targets:
            if name not in LORA_TARGETS:
                raise ValueError(f"tune.lora_targets has {name!r}{nearest(name, LORA_TARGETS)}")
        if len(set(self.lora_targets)) < len(self.lora_targets):
            raise ValueError(f"tune.lora_targets={list(self.lora_targets)} names one twice")

"""导出之后，用目标运行时算一遍，与原模型比：不同多少，直接说出来。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.models.transformer import GPT2Model

_ROWS, _LENGTH = 2, 48
_SAME = 0.25


@dataclass(frozen=True)
class Comparison:
    """runtime 是谁算的；difference 是 logits 的最大差，largest 是 |logit| 的最大值。

    words: 比了多少个 logits；agree: 两边最大 logit 的 id 相同的位置占多少。
    """

    runtime: str
    difference: float
    largest: float
    words: int
    agree: float

    @property
    def same(self) -> bool:
        """还是不是同一个模型：舍入（bfloat16、八位）差得远不到这么多，写错了的远不止；NaN 不是。"""
        return self.difference <= _SAME * self.largest

    def __str__(self) -> str:
        return (
            f"{self.runtime}: largest logit difference {self.difference:.2e} "
            f"(largest logit {self.largest:.3g}, over {self.words:,}); "
            f"same next token at {self.agree:.1%} of the positions"
        )


@dataclass(frozen=True)
class Exported:
    """导出的结果。

    Attributes:
        written: 写出的文件夹。
        kind: 写成了什么。
        notes: 为此做的改写，每条一句英文。
        checked: 目标运行时算出来的比较，或一句为什么没有比。
    """

    written: Path
    kind: str
    notes: tuple[str, ...]
    checked: Comparison | str


def sample_ids(model: GPT2Model, rows: int = _ROWS, length: int = _LENGTH) -> Tensor:
    """(rows, T) 的随机词元，种子固定；T 不超过上下文。"""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    size = (rows, min(length, config.context_size))
    return torch.randint(config.vocab_size, size, generator=generator)


def compare(
    model: GPT2Model,
    theirs: Callable[[Tensor], Tensor],
    runtime: str,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Comparison:
    """theirs (B, T) -> (B, T, V')；多出的词表行、mask 为 0 的位置不比。model 应在 CPU 上。"""
    if ids is None:
        ids = sample_ids(model)
    real = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        mine = model(ids, attention_mask=mask)["logits"][real != 0].double()
        other = theirs(ids)[real != 0].double()[:, : mine.shape[-1]]
    return Comparison(
        runtime,
        difference=(mine - other).abs().max().item(),
        largest=mine.abs().max().item(),
        words=mine.numel(),
        agree=(mine.argmax(-1) == other.argmax(-1)).double().mean().item(),
    )

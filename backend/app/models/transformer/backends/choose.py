"""选后端：只看静态事实（图样、长度、设备、精度），并说出英文的理由。

命令行的 plan、训练日志与前向问的是同一个函数，所以说的就是做的。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..config import Backend, GPT2Config
from ..visibility.pattern import Pattern
from .tiles import estimated_area

Name = Literal["reference", "sdpa", "blocked", "flex", "parts"]

# 分块的打分数不到 T² 的这么多才比一张稠密掩码快：每块另有调用的开销。
# 交界的测量见 docs/decisions/006。
_WORTH = 0.45


@dataclass(frozen=True)
class Case:
    """一次注意力的静态事实。

    Attributes:
        everything: 因果之内处处可见（图样是 causal，或上下文还没有越过窗口）。
        own_keys: 键就是这些查询自己的键（没有缓存），且下标之差等于位置之差。
    """

    pattern: Pattern
    q_len: int
    k_len: int
    everything: bool
    own_keys: bool
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    dropout: float = 0.0
    grad: bool = False


def choose_backend(asked: Backend, case: Case) -> tuple[Name, str]:
    """(后端, 理由)。

    Raises:
        ValueError: 点名的后端做不了这件事。
    """
    if asked in ("reference", "sdpa"):
        return asked, "asked for"
    if case.everything:
        return "sdpa", f"{asked}: every earlier key is visible, so the fused causal kernel is best"
    if not case.own_keys:
        return "sdpa", f"{asked}: few queries on cached keys, one dense mask"
    if asked == "blocked":
        return "blocked", "asked for"
    if asked == "flex":
        reason = _why_not_flex(case)
        if reason is not None:
            raise ValueError(
                f"attention_backend='flex': {reason}; attention_backend='auto' chooses for you"
            )
        return "flex", "asked for"
    if case.device.type == "cuda" and _why_not_flex(case) is None:
        return "flex", "auto: compiled FlexAttention skips the hidden blocks on a GPU"
    share = estimated_area(case.pattern, case.q_len) / (case.q_len * case.k_len)
    if share < _WORTH:
        return "blocked", f"auto: {case.pattern} needs {share:.1%} of the {case.q_len}² scores"
    return "sdpa", (
        f"auto: {case.pattern} would save too little at {case.q_len} tokens "
        f"({share:.0%} of the scores), so a dense mask"
    )


@dataclass(frozen=True)
class Choice:
    """哪些层、什么图样、用哪个后端、为什么。"""

    layers: tuple[int, ...]
    pattern: Pattern
    backend: Name
    reason: str


def explain_backends(
    config: GPT2Config,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
    length: int | None = None,
) -> list[Choice]:
    """不建模型就说出每种图样会用哪个后端：length 个词元（默认 context_size）的整段前向。

    Raises:
        ValueError: 点名的后端做不了这件事。
    """
    length = config.context_size if length is None else length
    choices = []
    for pattern in dict.fromkeys(config.patterns):
        case = Case(
            pattern, length, length, length <= pattern.solid, True, device, dtype,
            config.head_dim, config.dropout if training else 0.0, training,
        )  # fmt: skip
        layers = tuple(i for i, p in enumerate(config.patterns) if p == pattern)
        choices.append(Choice(layers, pattern, *choose_backend(config.attention_backend, case)))
    return choices


def _why_not_flex(case: Case) -> str | None:
    from .flex import why_not

    return why_not(
        case.device, case.dtype, grad=case.grad, dropout=case.dropout,
        q_len=case.q_len, head_dim=case.head_dim,
    )  # fmt: skip

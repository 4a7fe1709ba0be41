"""图样：人话，与遮住的格子。

T 词元数、L 图样数。
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.models.transformer.visibility.atoms import (
    Fixed,
    Global,
    Local,
    Longformer,
    Sinks,
    Strided,
)  # fmt: skip
from app.models.transformer.visibility.coverage import seen
from app.models.transformer.visibility.pattern import And, Causal, Or, Pattern


def hidden(patterns: Sequence[Pattern], length: int) -> np.ndarray:
    """(L, T, T) bool：第 q 行里这个查询看不见的键；因果的上半也是。"""
    return np.stack([~seen(pattern, length).numpy() for pattern in patterns])


def words(pattern: Pattern) -> str:
    """一句英文：一个词元看得见什么。"""
    match pattern:
        case Causal():
            return "every earlier token and itself"
        case Local(window, dilation):
            each = "" if dilation == 1 else f", one in {dilation}"
            return f"the last {window} tokens{each}, itself included"
        case Strided(stride):
            return f"every {stride}th token back from itself"
        case Fixed(length, c):
            return f"its own block of {length} tokens and the last {c} of every block"
        case Global(n):
            return f"the first {n} tokens"
        case Longformer(window, n_global, dilation):
            near = words(Local(window, dilation))
            return f"{near}, or {words(Global(n_global))}" if n_global else near
        case Sinks(n, window):
            return f"{words(Global(n))}, or {words(Local(window))}"
        case Or(parts):
            return ", or ".join(words(part) for part in parts)
        case And(parts):
            return ", but only ".join(words(part) for part in parts)
    raise ValueError(f"the pattern {pattern} has no words yet: add them to inspection/patterns.py")

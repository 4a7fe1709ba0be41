"""图样配不配得上一个上下文：每个查询都有键可看，没有哪个数大过上下文。不需要 torch。"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache

from .atoms import Global, Local, Strided
from .pattern import Pattern

# 查找看不见键的查询时最多试多少对；正常的图样用不到百分之一。
_MOST_TRIES = 1 << 18


@lru_cache(maxsize=256)
def check_pattern(pattern: Pattern, context: int) -> None:
    """
    Raises:
        ValueError: 有一个数大过上下文（训练永远用不到它，多半是写错），
            或有的查询什么也看不见；点名图样、值与改法。
    """
    for atom in pattern.atoms:
        for field in fields(atom):
            value = getattr(atom, field.name)
            if field.name != "dilation" and value > context:
                raise ValueError(
                    f"{field.name}={value} of {atom} is more than context_size={context}: "
                    f"use {field.name} <= {context}, or causal"
                )
        dilation = getattr(atom, "dilation", 1)
        if dilation > 1 and atom.reach is not None and atom.reach > context:
            raise ValueError(
                f"{atom} reaches {atom.reach} positions back, more than context_size={context}: "
                f"use window <= {(context - 1) // dilation + 1} or a smaller dilation"
            )
    blind = blind_query(pattern, context)
    if blind is not None:
        raise ValueError(
            f"the query at position {blind} sees no key under {pattern} (context_size={context}): "
            "add '| local(1)', with which each sees itself"
        )


def blind_query(pattern: Pattern, context: int) -> int | None:
    """第一个什么键也看不见的查询位置（context 之内），没有则 None。逐次点名的词元不算。

    可见性在越过所有窗口之后按 period 重复，所以只需看到那里为止。

    Raises:
        ValueError: 周期长得查不完。
    """
    if pattern.sees_itself:
        return None
    # 走到这里，每个子句都有 global（或 marked）；在它的前缀之内，查询总看得见自己。
    clauses = [c for c in pattern.clauses() if not any(atom.takes_marks for atom in c)]
    first = max((_prefix(clause) for clause in clauses), default=0)
    atoms = [atom for clause in clauses for atom in clause]
    widest = max((atom.reach or 0 for atom in atoms), default=0)
    tries = 0
    for q in range(first, min(context, first + widest + 2 * pattern.period + 1)):
        for k in (k for clause in clauses for k in _candidates(clause, q)):
            tries += 1
            if tries > _MOST_TRIES:
                raise ValueError(
                    f"{pattern} is too irregular to check that every query sees a key: "
                    "add '| local(1)', with which each sees itself"
                )
            if pattern.allow(q, k):
                break
        else:
            return q
    return None


def _prefix(clause: tuple[Pattern, ...]) -> int:
    return min(atom.n for atom in clause if isinstance(atom, Global))


def _candidates(clause: tuple[Pattern, ...], q: int) -> Iterator[int]:
    """子句里 local、strided、global 三者都允许的键，从近到远；其余原子由调用者再查。"""
    local = [atom for atom in clause if isinstance(atom, Local)]
    strides = [atom.stride for atom in clause if isinstance(atom, Strided)]
    step = math.lcm(*strides, *(atom.dilation for atom in local))
    last = min(q, _prefix(clause) - 1)
    lowest = max([0, *(q - atom.reach + 1 for atom in local)])
    yield from range(last - (last - q) % step, lowest - 1, -step)

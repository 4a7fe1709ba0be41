"""一个命令的选项怎样解析、--help 怎样写：各命令一样。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """命令的名字，与 --help 开头的两段。"""

    name: str
    summary: str
    examples: str


def parse_options(kind: type[T], argv: Sequence[str], usage: Usage, default: T | None = None) -> T:
    """argv 按 kind（带 Doc 的数据类）解析，盖在 default 上；坏的选项由 tyro 说明并退出。"""
    import tyro

    return tyro.cli(
        kind,
        prog=f"gpt2 {usage.name}",
        args=list(argv),
        description=f"{usage.summary}\n\nexamples:\n{usage.examples}",
        config=(tyro.conf.HelptextFromCommentsOff,),
        default=tyro.MISSING_NONPROP if default is None else default,
    )

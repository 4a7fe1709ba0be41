"""终端上的表。"""

from __future__ import annotations

from collections.abc import Sequence

Table = list[tuple[str, ...]]


def print_table(table: Sequence[tuple[str, ...]]) -> None:
    """与训练的开头一样：两格缩进，各列左对齐，最后空一行。"""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())
    print(flush=True)

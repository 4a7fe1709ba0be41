"""终端上的表与字节数。"""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")

Table = list[tuple[str, ...]]


def print_table(table: Table) -> None:
    """与训练的开头一样：两格缩进，各列左对齐，最后空一行。"""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())
    print()


def size(count: int) -> str:
    """字节数，三位有效数字上下：999 bytes，1.50 GiB。"""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{value:,.{2 if value < 10 else 1}f} {_UNITS[unit]}"

"""说给人听的话，两种语言：命令行说英语，verify_implementation.py 说中文。"""

from __future__ import annotations

from typing import Literal, NamedTuple

Language = Literal["english", "chinese"]


class Said(NamedTuple):
    """同一句话。"""

    english: str
    chinese: str

    def to(self, language: Language) -> str:
        return self.english if language == "english" else self.chinese

    def join(self, other: Said) -> Said:
        """接着说另一句。"""
        return Said(f"{self.english}; {other.english}", f"{self.chinese}；{other.chinese}")


# 通过与否，与量到的数。
Result = tuple[bool, Said]


def tally(total: int, wrong: list[str], what: Said) -> Said:
    """几分之几，与不对的头几个。"""
    count, names = f"{total - len(wrong)}/{total}", ", ".join(wrong[:3])
    return Said(
        f"{count} {what.english}" + (f", wrong: {names}" if wrong else ""),
        f"{count} {what.chinese}" + (f"，不对：{names}" if wrong else ""),
    )


def error(worst: float) -> Said:
    """双精度的相对误差与它的界。"""
    return Said(f"relative error {worst:.1e} (limit 1e-12)", f"相对误差 {worst:.1e}（限 1e-12）")

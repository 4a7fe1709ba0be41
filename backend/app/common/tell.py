"""说一句话给人听：一个函数，由调用者决定说到哪里。"""

from __future__ import annotations

import sys
from collections.abc import Callable

Tell = Callable[[str], object]


def to_stderr(text: str) -> None:
    """标准输出留给结果，其余的话说到标准错误。"""
    print(text, file=sys.stderr)

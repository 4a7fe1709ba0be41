"""time_limit 的写法：90s、30m、1h30m。"""

from __future__ import annotations

import re

_FORM = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_of(text: str) -> float:
    """
    Raises:
        ValueError: 不是这样写的，或是零。
    """
    found = _FORM.fullmatch(text.strip())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise ValueError(f"time_limit={text!r} is not a time: write 90s, 30m or 1h30m")
    return float(total)

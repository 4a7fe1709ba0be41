"""注意力图样：哪些键位置在静态上允许被看见。只做整数比较，torch 与 Python 整数都适用。

因果性是所有图样的公共底色；reach 与 pinned 让缓存知道哪些键可以不再保留。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Causal:
    """完全因果：键位置不晚于查询位置（Vaswani et al. 2017, 第 3.2.3 节）。"""

    # 往回最远能看到几个键（含自己）；None = 无界。
    reach: int | None = None
    # 开头多少个位置永不淘汰。
    pinned: int = 0

    def allow(self, q: Any, k: Any) -> Any:
        return k <= q


CAUSAL = Causal()

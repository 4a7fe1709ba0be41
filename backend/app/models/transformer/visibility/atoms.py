"""图样的原子，以及几个有名字的组合。

来源：Child et al. 2019, arXiv:1904.10509（strided、fixed）；Beltagy et al. 2020,
arXiv:2004.05150（longformer）；Xiao et al. 2023, arXiv:2309.17453（sinks）；
Mistral 7B, arXiv:2310.06825（local）。
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from .pattern import LARGEST, Pattern


def _check(pattern: Pattern, *names: str, low: int = 1) -> None:
    for name in names:
        value = getattr(pattern, name)
        if type(value) is not int or not low <= value <= LARGEST:
            raise ValueError(
                f"{pattern.name}({name}={value!r}): {name} must be an integer "
                f"from {low} to {LARGEST}"
            )


@dataclass(frozen=True)
class Local(Pattern):
    """最近 window 个键（含自己），每隔 dilation 取一个。"""

    window: int
    dilation: int = 1
    name: ClassVar[str] = "local"

    def __post_init__(self) -> None:
        _check(self, "window", "dilation")

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        near = q - k < self.window * self.dilation
        return near if self.dilation == 1 else near & ((q - k) % self.dilation == 0)

    @property
    def solid(self) -> int:
        return self.window if self.dilation == 1 else 1

    @property
    def reach(self) -> int:
        return (self.window - 1) * self.dilation + 1


@dataclass(frozen=True)
class Strided(Pattern):
    """距离是 stride 的倍数（Sparse Transformer 的 A2）；论文的合并头是 local(l) | strided(l)。"""

    stride: int
    name: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        _check(self, "stride")

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return (q - k) % self.stride == 0

    @property
    def solid(self) -> int:
        return LARGEST if self.stride == 1 else 1

    @property
    def period(self) -> int:
        return self.stride


@dataclass(frozen=True)
class Fixed(Pattern):
    """同一块之内，加上每块的最后 c 列（Sparse Transformer 的 fixed，A1 与 A2 之并）。"""

    length: int
    c: int
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _check(self, "length", "c")
        if self.c > self.length:
            raise ValueError(
                f"fixed(length={self.length}, c={self.c}): c summary columns of a block cannot "
                f"exceed its length: use c <= {self.length}"
            )

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return (q // self.length == k // self.length) | (k % self.length >= self.length - self.c)

    @property
    def solid(self) -> int:
        return LARGEST if self.c == self.length else self.length

    @property
    def period(self) -> int:
        return self.length


@dataclass(frozen=True)
class Global(Pattern):
    """人人都看得见最前 n 个位置。"""

    n: int
    name: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        _check(self, "n")

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        # 与 q 比较只为形状：整数与广播之后的张量都适用。
        return (k < self.n) & (q >= 0)

    @property
    def solid(self) -> int:
        return self.n

    @property
    def reach(self) -> int:
        return 0

    @property
    def pinned(self) -> int:
        return self.n

    @property
    def sees_itself(self) -> bool:
        return False


@dataclass(frozen=True)
class Marked(Pattern):
    """本次点名的全局词元：它看得见一切，一切看得见它。只在 longformer 之内出现。"""

    name: ClassVar[str] = "marked"

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return (k <= q) & marked

    @property
    def solid(self) -> int:
        return 0

    @property
    def reach(self) -> int:
        return 0

    @property
    def sees_itself(self) -> bool:
        return False

    @property
    def takes_marks(self) -> bool:
        return True


class _Named(Pattern):
    """几个部分之并的别名：自己的名字留在文本里，事实全来自 union。"""

    @cached_property
    def union(self) -> Pattern:
        raise NotImplementedError

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return self.union.allow(q, k, marked)

    @property
    def reach(self) -> int | None:
        return self.union.reach

    @property
    def pinned(self) -> int:
        return self.union.pinned

    @property
    def solid(self) -> int:
        return self.union.solid

    @property
    def takes_marks(self) -> bool:
        return self.union.takes_marks

    def clauses(self) -> tuple[tuple[Pattern, ...], ...]:
        return self.union.clauses()


@dataclass(frozen=True)
class Longformer(_Named):
    """local(window, dilation) | global(n_global)，并接受逐次点名的全局词元。"""

    window: int
    n_global: int
    dilation: int = 1
    name: ClassVar[str] = "longformer"

    def __post_init__(self) -> None:
        _check(self, "window", "dilation")
        _check(self, "n_global", low=0)

    @cached_property
    def union(self) -> Pattern:
        near = Local(self.window, self.dilation)
        return near | Global(self.n_global) | Marked() if self.n_global else near | Marked()


@dataclass(frozen=True)
class Sinks(_Named):
    """global(n) | local(window)：StreamingLLM 的注意力池。"""

    n: int
    window: int
    name: ClassVar[str] = "sinks"

    def __post_init__(self) -> None:
        _check(self, "n", "window")

    @cached_property
    def union(self) -> Pattern:
        return Global(self.n) | Local(self.window)

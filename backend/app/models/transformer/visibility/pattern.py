"""注意力图样：哪些键位置在静态上允许被看见。一个小而可散列的代数，不需要 torch。

    local(256) | global(16)          strided(64) & local(1024)

q、k 是绝对位置（Python 整数或整数张量）。因果性（k <= q）是公共底色，由 masking 统一加上。
reach 与 pinned 是一个上界：看得见的键都在「最近 reach 个（含自己）」或「最前 pinned 个」之内。

这里是共同的接口与 &、|；原子在 atoms.py。
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import reduce
from itertools import product
from operator import and_, or_
from typing import Any, ClassVar

# 远大于任何上下文；再大的窗口只会是写错了。
LARGEST = 1 << 30
# 析取范式是乘出来的：(a | b) & (c | d) & … 每多一项翻一倍。
_MAX_CLAUSES = 64


@dataclass(frozen=True)
class Pattern:
    """图样的共同接口。子类只需给出 allow、reach、pinned。"""

    name: ClassVar[str] = ""

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        """位置 q 可否看位置 k（不含因果性）。marked：二者之一是本次点名的全局词元。"""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """往回最远看到几个键（含自己）；None = 无界。"""
        return None

    @property
    def pinned(self) -> int:
        """开头多少个位置永远可能被看见，缓存不可淘汰。"""
        return 0

    @property
    def solid(self) -> int:
        """上下文不超过这么长时，与 causal 没有区别。"""
        return 1

    @property
    def sees_itself(self) -> bool:
        """每个查询都看得见自己。"""
        return True

    @property
    def period(self) -> int:
        """q 足够大之后，可见性随 q 重复的周期。"""
        return 1

    @property
    def takes_marks(self) -> bool:
        """接受逐次点名的全局词元（Longformer）。"""
        return False

    def clauses(self) -> tuple[tuple[Pattern, ...], ...]:
        """析取范式：若干子句的并，每个子句是若干原子的交。"""
        return ((self,),)

    @property
    def spread(self) -> int:
        """析取范式最多有几个子句，不必展开。"""
        return len(self.clauses())

    @property
    def atoms(self) -> tuple[Pattern, ...]:
        """写出来的各个原子。"""
        return (self,)

    def __and__(self, other: Pattern) -> Pattern:
        """因果性是公共底色，所以与 causal 之交不变；与自己之交是自己。"""
        if isinstance(self, Causal) or isinstance(other, Causal):
            return other if isinstance(self, Causal) else self
        return And((self, other)).simple

    def __or__(self, other: Pattern) -> Pattern:
        if isinstance(self, Causal) or isinstance(other, Causal):
            return CAUSAL
        return Or((self, other)).simple

    def __str__(self) -> str:
        values = [getattr(self, f.name) for f in fields(self)]
        if hasattr(self, "dilation") and values[-1] == 1:
            values.pop()
        return f"{self.name}({', '.join(map(str, values))})"


@dataclass(frozen=True)
class Causal(Pattern):
    """完全因果（Vaswani et al. 2017, 第 3.2.3 节）。"""

    name: ClassVar[str] = "causal"

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return k <= q

    @property
    def solid(self) -> int:
        return LARGEST

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Compound(Pattern):
    """And、Or 的共同部分：把同类嵌套摊平，a | (b | c) 与 (a | b) | c 因此相等。"""

    parts: tuple[Pattern, ...]
    sign: ClassVar[str] = ""

    def __post_init__(self) -> None:
        flat: list[Pattern] = []
        for part in self.parts:
            flat.extend(part.parts if isinstance(part, type(self)) else (part,))
        object.__setattr__(self, "parts", tuple(dict.fromkeys(flat)))
        if self.spread > _MAX_CLAUSES:
            raise ValueError(
                f"{self} unfolds into {self.spread} alternatives, more than {_MAX_CLAUSES}: "
                "use a simpler pattern"
            )

    @property
    def spread(self) -> int:
        counts = [part.spread for part in self.parts]
        return math.prod(counts) if self.sign == "&" else sum(counts)

    @property
    def simple(self) -> Pattern:
        return self if len(self.parts) > 1 else self.parts[0]

    @property
    def atoms(self) -> tuple[Pattern, ...]:
        return tuple(atom for part in self.parts for atom in part.atoms)

    @property
    def period(self) -> int:
        return math.lcm(*(part.period for part in self.parts))

    @property
    def takes_marks(self) -> bool:
        return any(part.takes_marks for part in self.parts)

    def __str__(self) -> str:
        texts = [f"({p})" if isinstance(p, Or) else str(p) for p in self.parts]
        return f" {self.sign} ".join(texts)


@dataclass(frozen=True)
class And(_Compound):
    sign: ClassVar[str] = "&"

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return reduce(and_, (part.allow(q, k, marked) for part in self.parts))

    @property
    def solid(self) -> int:
        return min(part.solid for part in self.parts)

    @property
    def reach(self) -> int | None:
        known = [part.reach for part in self.parts if part.reach is not None]
        return min(known, default=None)

    @property
    def pinned(self) -> int:
        # 无界的那几个不收窄任何东西；有界的几个取最大的前缀，仍是上界。
        return max((p.pinned for p in self.parts if p.reach is not None), default=0)

    @property
    def sees_itself(self) -> bool:
        return all(part.sees_itself for part in self.parts)

    def clauses(self) -> tuple[tuple[Pattern, ...], ...]:
        choices = product(*(part.clauses() for part in self.parts))
        return tuple(dict.fromkeys(_joined(choice) for choice in choices))


@dataclass(frozen=True)
class Or(_Compound):
    sign: ClassVar[str] = "|"

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        return reduce(or_, (part.allow(q, k, marked) for part in self.parts))

    @property
    def solid(self) -> int:
        return max(part.solid for part in self.parts)

    @property
    def reach(self) -> int | None:
        reaches = [part.reach for part in self.parts]
        return None if None in reaches else max(r for r in reaches if r is not None)

    @property
    def pinned(self) -> int:
        return max(part.pinned for part in self.parts)

    @property
    def sees_itself(self) -> bool:
        return any(part.sees_itself for part in self.parts)

    def clauses(self) -> tuple[tuple[Pattern, ...], ...]:
        found = [clause for part in self.parts for clause in part.clauses()]
        return tuple(dict.fromkeys(found))


def _joined(choice: tuple[tuple[Pattern, ...], ...]) -> tuple[Pattern, ...]:
    """几个子句的交：去重，去掉不起作用的 causal。"""
    atoms = dict.fromkeys(atom for clause in choice for atom in clause)
    useful = tuple(atom for atom in atoms if not isinstance(atom, Causal))
    return useful or (CAUSAL,)


CAUSAL = Causal()

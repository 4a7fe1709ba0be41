"""稀疏图样落到几何：每一小块查询实际要读哪些键。花费由它决定，正确性不由它决定。

做法：几何只给出可见键的一个超集，块内仍按 masking.visible 逐对遮蔽，所以任何代数组合都精确。

- 近处：有界的子句看最近 R 个键，一块 Q 个查询读连续的 R+Q-1 个，与 T 成线性。
- 远列：人人都可能看的少数列（前缀、fixed 的汇总列、点名的全局词元），先集中到一起。
- 折叠：strided(s) 的查询只看同余类，按余数折成 s 条长 T/s 的因果序列，共 T·T/s。
  它与近处的结果按 log-sum-exp 合并，两边的键由谓词保证不重。

B 批、T 词元数、Q 一块的查询数、K 一块读的键数、g 一块里同余类的个数。
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..visibility.atoms import Fixed, Strided
from ..visibility.pattern import And, Or, Pattern
from ..visibility.positions import PADDING, Positions
from ..visibility.rule import visible

# 一块的查询数：小则多算的键少，大则矩阵乘的效率高（docs/decisions/006）。
QUERIES = 64
# 折叠时一次并排的 g·Q·K 的上限：短的同余类要并起来算，否则全是调用的开销。
_FOLD_AREA = 1 << 16
_EVERYTHING = 1 << 40


@dataclass(frozen=True)
class Rows:
    """下标 start + i + j·step，i < groups，j < count：连续的一段，或若干并排的同余类。"""

    start: int
    count: int
    step: int = 1
    groups: int = 1

    def of(self, x: Tensor, dim: int) -> Tensor:
        """把 x 的第 dim 维换成 (groups, count) 两维的视图，不复制。"""
        stride = x.stride(dim)
        shape = (*x.shape[:dim], self.groups, self.count, *x.shape[dim + 1 :])
        strides = (*x.stride()[:dim], stride, stride * self.step, *x.stride()[dim + 1 :])
        return x.as_strided(shape, strides, x.storage_offset() + self.start * stride)

    def positions(self, where: Positions) -> Positions:
        """(B·g, count)：同余类并进批维，故各坐标先展成同样的行数。"""

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else self.of(x.expand(where.rows, -1), 1).flatten(0, 1)

        pos = flat(where.pos)
        assert pos is not None
        return Positions(pos, flat(where.segment), marked=flat(where.marked))


@dataclass(frozen=True)
class Tile:
    """一块查询、它读的近处的键、远列里的一段，以及二者拼起来的遮蔽。

    bias: (B|1, 1, g, 1, Q, K) 加在分数上，看不见处是最小的有限数；None = 全部可见。
    """

    q: Rows
    near: Rows
    far: slice
    bias: Tensor | None

    @property
    def area(self) -> int:
        return self.q.groups * self.q.count * (self.near.count + self.far.stop - self.far.start)


@dataclass(frozen=True)
class Tiling:
    """一种图样在一组坐标上的全部块。

    Attributes:
        columns: (B|1, n) 远列的下标；None = 没有。
        terms: 每一项里一个查询至多在一块里；多于一项时按 log-sum-exp 合并。
        blind: (B|1, T) bool，什么键也看不见的查询（填充）；None = 没有。
    """

    columns: Tensor | None
    terms: tuple[tuple[Tile, ...], ...]
    blind: Tensor | None

    @property
    def area(self) -> int:
        """打分的总数：与 T² 相比就是省下的倍数。"""
        return sum(tile.area for term in self.terms for tile in term)


@dataclass(frozen=True)
class _Only(Pattern):
    """在 keep 之内而不在 drop 之内：折叠的一项不可重算别处已算的键。"""

    keep: Pattern
    drop: Pattern | None

    def allow(self, q: Any, k: Any, marked: Any = False) -> Any:
        seen = self.keep.allow(q, k, marked)
        if self.drop is not None:
            seen = seen & ~(self.drop.allow(q, k, marked) & (k <= q))
        return seen


@dataclass(frozen=True)
class Geometry:
    """图样的几何：main 由近处 near 个键与远列覆盖；其余每个 (stride, 子句) 折叠。"""

    main: Pattern | None
    near: int
    pinned: int
    summaries: tuple[Fixed, ...]
    folds: tuple[tuple[int, Pattern], ...]


@lru_cache(maxsize=256)
def geometry(pattern: Pattern) -> Geometry:
    """有一个子句无从省起时，近处就是一切：仍然精确，只是不省。"""
    near, pinned, summaries = 1, 0, []
    main: list[Pattern] = []
    folds: list[tuple[int, Pattern]] = []
    for atoms in pattern.clauses():
        clause = atoms[0] if len(atoms) == 1 else And(atoms)
        fixed = next((atom for atom in atoms if isinstance(atom, Fixed)), None)
        strides = [atom.stride for atom in atoms if isinstance(atom, Strided)]
        if clause.reach is not None:
            near, pinned = max(near, clause.reach), max(pinned, clause.pinned)
            main.append(clause)
        elif fixed is not None:
            # 同一块之内的键都在最近 length 个之内；再早的只有各块的汇总列。
            near = max(near, fixed.length)
            summaries.append(fixed)
            main.append(clause)
        elif strides and max(strides) > 1:
            folds.append((max(strides), clause))
        else:
            near = _EVERYTHING
            main.append(clause)
    whole = None if not main else main[0] if len(main) == 1 else Or(tuple(main))
    return Geometry(whole, near, pinned, tuple(summaries), tuple(folds))


def estimated_area(pattern: Pattern, length: int) -> float:
    """length 个词元时打分的总数，误差在四分之一以内，不必真的分块。"""
    shape = geometry(pattern)
    per_query = 0.0
    if shape.main is not None:
        # 每块多读 Q-1 个；近处还没有伸满的开头少读一些。
        near = min(shape.near, length)
        per_query += near - near * near / (2 * length) + QUERIES
        columns = shape.pinned + sum(
            length * fixed.c / fixed.length / 2 for fixed in shape.summaries
        )
        per_query += min(columns, length)
    for stride, _ in shape.folds:
        per_query += (length / stride + min(QUERIES, length / stride)) / 2
    return per_query * length


def tile(pattern: Pattern, where: Positions, dtype: torch.dtype) -> Tiling:
    """自注意力（查询与键同一组坐标 where，须 dense）的分块。

    无填充、无打包时只取决于长度，结果留着给以后的前向用。dtype 是分数的精度。
    """
    if where.start is not None and where.marked is None:
        return _plain(pattern, where.start, where.length, where.pos.device, dtype)
    return _tile(pattern, where, dtype)


@lru_cache(maxsize=32)
def _plain(
    pattern: Pattern, start: int, length: int, device: torch.device, dtype: torch.dtype
) -> Tiling:
    # 推理模式里造的张量不能为反向保存，而缓存会把它带进训练。
    with torch.inference_mode(False):
        return _tile(pattern, Positions.plain(start, length, device), dtype)


def _tile(pattern: Pattern, where: Positions, dtype: torch.dtype) -> Tiling:
    shape = geometry(pattern)
    columns = _columns(shape, where, pattern.takes_marks)
    biases = _Biases(dtype)
    terms, done = [], shape.main
    if shape.main is not None:
        terms.append(_main(shape.main, shape.near, where, columns, biases))
    for stride, clause in shape.folds:
        terms.append(_fold(stride, _Only(clause, done), where, biases))
        done = clause if done is None else Or((done, clause))
    terms = [term for term in terms if term]
    return Tiling(columns, tuple(map(tuple, terms)), _blind(terms, where))


def _columns(shape: Geometry, where: Positions, marks: bool) -> Tensor | None:
    """(B|1, n) 远列的下标，升序；各行个数不同时以 T（越界）补齐。"""
    pos = where.pos
    far = pos < shape.pinned
    for fixed in shape.summaries:
        far = far | (pos % fixed.length >= fixed.length - fixed.c)
    if marks and where.marked is not None:
        far = far | where.marked
    far = far & (pos != PADDING)
    count = far.sum(1, keepdim=True)
    n = int(count.max())
    if n == 0:
        return None
    index = far.byte().argsort(dim=1, descending=True, stable=True)[:, :n]
    return index.masked_fill(torch.arange(n, device=pos.device) >= count, where.length)


def _main(
    pattern: Pattern, near: int, where: Positions, columns: Tensor | None, biases: _Biases
) -> list[Tile]:
    tiles = []
    far_where = None if columns is None else where.take(columns)
    index = torch.arange(where.length, device=where.pos.device)
    starts = index - where.pos.clamp(min=0)  # 各词元所在文档的开头；填充算自己
    for a in range(0, where.length, QUERIES):
        b = min(a + QUERIES, where.length)
        lo = max(0, a - near + 1)
        q, keys, far = Rows(a, b - a), Rows(lo, b - lo), slice(0, 0)
        q_where = where.take(slice(a, b))
        seen = visible(q_where, where.take(slice(lo, b)), pattern)
        if columns is not None and far_where is not None:
            # 远列只取近处之前、且不早于这块查询所在文档开头的一段；各行不同则取并集。
            first = int((columns < starts[:, a, None]).sum(1).min())
            far = slice(first, max(first, int((columns < lo).sum(1).max())))
            early = visible(q_where, far_where.take(far), pattern)
            early = early & (columns[:, None, far] < lo)
            rows = max(len(seen), len(early))
            seen = torch.cat([seen.expand(rows, -1, -1), early.expand(rows, -1, -1)], -1)
        tiles.append(Tile(q, keys, far, biases.of(seen, 1)))
    return tiles


def _fold(stride: int, pattern: Pattern, where: Positions, biases: _Biases) -> list[Tile]:
    tiles = []
    whole, rest = divmod(where.length, stride)
    # 前 rest 个余数各多一个词元。
    for r0, r1, m in ((0, rest, whole + 1), (rest, stride, whole)):
        for a in range(0, m, QUERIES):
            b = min(a + QUERIES, m)
            groups = max(1, _FOLD_AREA // ((b - a) * b))
            for r in range(r0, r1, groups):
                g = min(groups, r1 - r)
                q, keys = Rows(r + a * stride, b - a, stride, g), Rows(r, b, stride, g)
                seen = visible(q.positions(where), keys.positions(where), pattern)
                if bool(seen.any()):
                    tiles.append(Tile(q, keys, slice(0, 0), biases.of(seen, g)))
    return tiles


class _Biases:
    """可见性变成加数；与上一个同形的相同就共用一份（无填充时绝大多数块都相同）。"""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._last: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def of(self, seen: Tensor, groups: int) -> Tensor | None:
        """seen (B·g, Q, K) -> (B, 1, g, 1, Q, K)。"""
        key = (groups, *seen.shape)
        if key not in self._last or not torch.equal(self._last[key][0], seen):
            bias = None
            if not bool(seen.all()):
                bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
                # 用有限的最小值：全被遮住的行 softmax 不出 NaN。
                bias.masked_fill_(~seen, torch.finfo(self.dtype).min)
                bias = bias.view(-1, 1, groups, 1, *seen.shape[1:])
            self._last[key] = seen, bias
        return self._last[key][1]


def _blind(terms: list[list[Tile]], where: Positions) -> Tensor | None:
    tiles = [t for term in terms for t in term]
    rows = max((len(t.bias) for t in tiles if t.bias is not None), default=1)
    blind = torch.ones(rows, where.length, dtype=torch.bool, device=where.pos.device)
    for t in tiles:
        part = t.q.of(blind, 1)
        part &= False if t.bias is None else (t.bias < 0).all(-1)[:, 0, :, 0]
    return blind if bool(blind.any()) else None

"""这一步谁走几个词元：纯函数，不依赖 torch，也不看钟。

没有"预填"与"解码"两个阶段：每行要把缓存追到自己的词元数。每行先走解码的一个（与草稿），
余下的时间读提示。预算是时间而不是词元数：一个词元要多久，每台机器不同（决定 022）。
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 比价目慢了马上信一半，快了慢慢信：宁可少读几个词元，也不使在写的多等。
_SLOWER, _FASTER = 0.5, 0.05


@dataclass(frozen=True)
class Costs:
    """一步 n 个词元要多少秒：量过的几个点，(n, 秒) 递增，中间按直线。"""

    points: tuple[tuple[int, float], ...]

    def seconds(self, n: int) -> float:
        """量过的最远处之外按最后一段的斜率。"""
        at = min(max(bisect_left(self.points, (n, 0.0)), 1), len(self.points) - 1)
        (n0, t0), (n1, t1) = self.points[at - 1], self.points[at]
        return max(0.0, t0 + (t1 - t0) * (n - n0) / (n1 - n0))

    def times(self, ratio: float) -> Costs:
        return Costs(tuple((n, ratio * seconds) for n, seconds in self.points))


class Drift:
    """近来一步是价目的几倍：价目在开张时量，那时机器闲着、缓存空着。"""

    def __init__(self) -> None:
        self.ratio = 1.0

    def learn(self, expected: float, seconds: float) -> None:
        # 一步卡住十倍说的是那一刻，不是往后。
        found = min(4.0, max(0.5, seconds / max(expected, 1e-9)))
        self.ratio += (_SLOWER if found > self.ratio else _FASTER) * (found - self.ratio)


@dataclass(frozen=True)
class Need:
    """一行要走多少。

    Attributes:
        left: 离自己的词元数还差几个；reading：还在读提示。
        most: 这一行一步至多几个（要打分的行 logits 占内存）。
        waited: 上次轮到之后过了几步；since：等了几秒。
    """

    row: int
    left: int
    reading: bool
    most: int
    waited: int = 0
    since: float = 0.0


@dataclass(frozen=True)
class Pace:
    """max_stall: 有行在写时，一步至多这么多秒；chunk: 没有行在写时，一步至多读这么多词元；
    patience: 等了这么多秒的提示先读。"""

    max_stall: float = 0.2
    chunk: int = 256
    patience: float = 2.0


# 写的行自己就超过了 max_stall 时，也至少读这么多：提示不会永远读不完。
_LEAST = 8


def share(
    needs: Sequence[Need], drafts: Mapping[int, int], costs: Costs, pace: Pace
) -> dict[int, int]:
    """{行: 这一步的词元数}。drafts：{行: 草稿的长度}。

    读的次序：等得太久的先，然后剩得少的先。短提示不必等在长提示后面，长的也不会饿死。
    没有行在写时，几个提示平分这一步、一同读完：先读完的一写，别的就只能按 max_stall 读，慢两三倍。
    """
    writing = [need for need in needs if not need.reading]
    given = {need.row: need.left + drafts.get(need.row, 0) for need in writing}
    used = sum(given.values())
    room = pace.chunk
    if writing:
        sizes = range(_LEAST, pace.chunk + 1, _LEAST)
        fit = bisect_right(sizes, pace.max_stall, key=lambda n: costs.seconds(used + n))
        room = sizes[max(0, fit - 1)] if sizes else _LEAST
    starved = {
        need.row for need in needs if need.since >= pace.patience or need.waited >= len(needs)
    }
    order = sorted(
        (need for need in needs if need.reading),
        key=lambda need: (0, -need.waited, need.left) if need.row in starved else (1, need.left, 0),
    )
    for place, need in enumerate(order):
        each = room if writing else max(_LEAST, room // (len(order) - place))
        count = min(need.left, need.most, each, room)
        if count < 1:
            break
        given[need.row] = count
        room -= count
    return given

"""猜接下来的几个词元（草稿），由模型一步验完；猜中的就是本来要写的，所以文字不变。

n 元组的草稿：最近几个词元上次出现之后写了什么（Saxena 2023, prompt lookup decoding）。
每个词元 O(1) 查表：每步搜一遍全文的做法在 CPU 上比省下的还贵。
"""

from __future__ import annotations

from collections.abc import Sequence

from app.serving.schedule import Costs

# 先找最近四个都相同的地方，再三个、两个。
_GRAMS = (4, 3, 2)
_SIZES = (15, 7, 3)
# 少于这个好处不值得猜；不值得时每隔这么多步再试一次。
_WORTH, _RETRY = 1.05, 32
# 忙到这么多行，多算的词元不再便宜（决定 002 的表）。
BUSY = 8
_FADE = 0.8


class NGrams:
    """一行的表。"""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """tokens 只许在后面变长。"""
        for i in range(self._seen, len(tokens)):
            for n in _GRAMS:
                if i >= n:
                    self._after[tuple(tokens[i - n : i])] = i
        self._seen = len(tokens)
        for n in _GRAMS:
            at = self._after.get(tuple(tokens[-n:]))
            if at is not None:
                return list(tokens[at : at + most])
        return []


class Gain:
    """一行猜得准不准，因此值不值得猜。"""

    def __init__(self) -> None:
        self._rate, self._rest = 0.6, 0

    def size(self, costs: Costs, busy: int, each: float) -> int:
        """这一步猜几个；busy：这一步各行本来要走的词元数；each：猜一个要几秒。"""
        if busy >= BUSY:
            return 0
        if self._rest > 0:
            self._rest -= 1
            if self._rest:
                return 0
            self._rate = max(self._rate, 0.6)
        plain, best = costs.seconds(busy), (_WORTH, 0)
        for k in _SIZES:
            accepted = sum(self._rate**i for i in range(1, k + 1))
            # 别的行照走一个：多得的只在这一行，多花的大家一起等。
            gain = (busy + accepted) / busy * plain / (costs.seconds(busy + k) + k * each)
            best = max(best, (gain, k))
        if best[1] == 0:
            self._rest = _RETRY
        return best[1]

    def learn(self, drafted: int, accepted: int) -> None:
        tried = accepted + (accepted < drafted)
        for hit in [1.0] * accepted + [0.0] * (tried - accepted):
            self._rate = _FADE * self._rate + (1 - _FADE) * hit

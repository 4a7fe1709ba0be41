"""停止串：跨词元边界也要找到，并且不把它的开头先流出去。"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def check_stop_strings(stops: Sequence[str]) -> None:
    """
    Raises:
        ValueError: 给的是一个字符串而不是几个，或有空的（它在任何地方都匹配）。
    """
    if isinstance(stops, str):
        raise ValueError(f"stop_strings={stops!r} is one string: give a list of strings")
    if "" in stops:
        raise ValueError("stop string '' is empty: it would stop before the first token")


class StopText:
    """一行文本的出口：喂入片段，吐出可以放心显示的部分。

    压住不放的只有可能是停止串开头的尾巴，所以每个词元的代价与已生成的长度无关。
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: 都不空（check_stop_strings）。"""
        self._stops = tuple(stops)
        self._held = ""
        self._length = 0  # 已喂入的字符数，含压住的
        self._ends: list[int] = []  # 每个词元之后的 _length
        self.stopped = False
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """喂入一个词元的文本（可以是空的：多字节字符的前一半），返回可以显示的文本。"""
        self._length += len(piece)
        self._ends.append(self._length)
        return self._release(piece)

    def close(self, rest: str) -> str:
        """没有更多词元了：rest 是解码器里剩下的，与压住的一起放出。"""
        self._length += len(rest)
        out = self._release(rest)
        if not self.stopped:
            out, self._held = out + self._held, ""
        return out

    def kept_tokens(self) -> int:
        """停下之后：有多少个词元的文本完全在切口之前。"""
        if not self.stopped:
            return len(self._ends)
        within = [end for end in self._ends if 0 < end <= self._length]
        return bisect_left(self._ends, within[-1]) + 1 if within else 0

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            cut, self.matched = min(found, key=lambda one: one[0])
            # 从此 _length 是切口的位置。
            self._length -= len(text) - cut
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _open_suffix(self, text: str) -> int:
        """text 最长的、是某个停止串真前缀的后缀的长度。"""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0

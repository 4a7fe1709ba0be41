"""长活的进度：终端上一条活动的进度条，别处（日志、CI）隔几秒一行。"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from .console import printable
from .units import duration

_REFRESH_SECONDS, _LINE_SECONDS = 0.25, 10.0

Advance = Callable[[int], None]


class Display:
    """一件长活的显示。

    输出失败（管道或终端已关）之后就不再显示：显示不该毁掉活计。

    Args:
        label: 每一行的开头。
        total, done: 一共多少，已有多少；条按它们走。
        to_stderr: 显示在标准错误，标准输出留给结果。
    """

    def __init__(self, label: str, total: int, done: int = 0, to_stderr: bool = False) -> None:
        self._label, self._total, self._done = label, total, done
        self._to_stderr, self._quiet = to_stderr, False
        self._bar: Any = None
        self._next = 0.0

    def __enter__(self) -> Display:
        if self._stream.isatty():
            self._bar = self._make_bar()
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._to_stderr else sys.stdout

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            console=Console(file=self._stream),
            auto_refresh=False,
            transient=True,
        )
        bar.add_task(self._label, total=self._total, completed=self._done, text="")
        return bar

    def tell(self, text: str) -> None:
        """一行话，在活动的条之上。"""
        bar = self._bar
        words = printable(text, self._stream)
        if bar is not None:
            self._try(lambda: bar.console.print(words, markup=False, highlight=False))
        else:
            self._try(lambda: print(words, file=self._stream, flush=True))

    def show(self, done: int, text: Callable[[], str]) -> None:
        """走到 done；到了该显示的时候才显示 text()。"""
        now, bar = time.perf_counter(), self._bar
        if now < self._next:
            return
        self._next = now + (_LINE_SECONDS if bar is None else _REFRESH_SECONDS)
        if bar is None:
            self.tell(f"{self._label} {text()}")
        else:
            self._try(lambda: bar.update(0, completed=done, text=text(), refresh=True))

    def wait(self) -> None:
        """第一行也要隔那么久：刚开始的速度说明不了什么。"""
        if self._bar is None:
            self._next = time.perf_counter() + _LINE_SECONDS

    def _try(self, action: Callable[[], object]) -> None:
        if self._quiet:
            return
        try:
            action()
        except OSError:
            self._quiet = True


@contextmanager
def count_bytes(label: str, total: int, done: int = 0) -> Iterator[Advance]:
    """给出 advance(字节)，在标准错误。"""

    def text(now: int, speed: float) -> str:
        left = max(0.0, (total - now) / speed)
        return f"{now / 1e6:.1f} of {total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, {left:.0f} s left"

    with Display(f"{label}:", total, done, to_stderr=True) as display:
        yield _advance(display, done, text)


@contextmanager
def count_tokens(label: str, total: int) -> Iterator[Advance]:
    """给出 advance(词元)，在标准错误。"""

    def text(now: int, speed: float) -> str:
        left = duration((total - now) / speed)
        return f"{now:,}/{total:,} tokens  {speed:,.0f} tokens/s  {left} left"

    with Display(f"{label}:", total, to_stderr=True) as display:
        yield _advance(display, 0, text)


def _advance(display: Display, before: int, text: Callable[[int, float], str]) -> Advance:
    """text 由（有了多少，这一次每秒多少）成文。"""
    display.wait()
    start, fresh = time.perf_counter(), 0

    def advance(amount: int) -> None:
        nonlocal fresh
        fresh += amount
        speed = fresh / (time.perf_counter() - start)
        display.show(before + fresh, lambda: text(before + fresh, speed))

    return advance

"""进度：终端上用 rich 的进度条，别处（日志、CI）用普通的行。"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 10.0


@contextmanager
def track(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """给出 advance(bytes)；total 与 done 以字节计。"""
    if sys.stderr.isatty():
        yield from _bar(label, total, done)
    else:
        yield from _lines(label, total, done)


def _bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(label, total=total, completed=done)
        yield lambda n: progress.advance(task, n)


def _lines(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    fresh = 0

    def advance(n: int) -> None:
        nonlocal last, fresh
        fresh += n
        now = time.monotonic()
        if now - last >= _LINE_SECONDS:
            last = now
            speed = fresh / (now - start)
            left = max(0.0, (total - done - fresh) / speed)
            print(
                f"{label}: {(done + fresh) / 1e6:.1f} of {total / 1e6:.1f} MB, "
                f"{speed / 1e6:.1f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    yield advance

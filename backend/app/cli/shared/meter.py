"""长活的进度，以词元计，在标准错误：终端上一条活动的进度条，别处每十秒一行。"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.training.report.progress import duration

_LINE_SECONDS = 10.0


@contextmanager
def meter(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """给出 advance(tokens)；显示词元每秒与剩余时间。"""
    if sys.stderr.isatty():
        yield from _bar(label, total)
    else:
        yield from _lines(label, total)


def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    show = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,}/{task.total:,} tokens  {task.fields[facts]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with show:
        # 标签里可能有方括号，别当作标记
        task = show.add_task(label.replace("[", r"\["), total=total, facts="")
        start, done = time.perf_counter(), 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            show.update(task, completed=done, facts=_facts(done, total, start))

        yield advance


def _lines(label: str, total: int) -> Iterator[Callable[[int], None]]:
    start = last = time.perf_counter()
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done, last
        done += tokens
        now = time.perf_counter()
        if now - last >= _LINE_SECONDS:
            last = now
            facts = _facts(done, total, start)
            print(f"{label}: {done:,}/{total:,} tokens  {facts}", file=sys.stderr, flush=True)

    yield advance


def _facts(done: int, total: int, start: float) -> str:
    speed = done / (time.perf_counter() - start)
    return f"{speed:,.0f} tokens/s  {duration((total - done) / speed)} left"

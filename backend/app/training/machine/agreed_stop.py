"""各 rank 在同一步停下：信号往往只有一个 rank 收到，各停各的就有人在集合操作里空等。

收到信号的 rank 若一直等不到别的（那个已死或卡住），grace 秒之后自己退出：torchrun 只等 30 秒就
发 SIGKILL，而那 30 秒里什么也不会发生。
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch

from app.distributed.comm import Ranks
from app.distributed.launch import orphaned

from .stop_signal import StopSignal

# 与 shell 的"被信号结束"区分开。
BLOCKED = 75


class AgreedStop:
    """StopSignal 加上各 rank 的商定；只有一个 rank 时就是 StopSignal 本身。

    Attributes:
        grace: 收到信号之后，多久没有一点进展就退出。
    """

    def __init__(self, signal_: StopSignal, ranks: Ranks, grace: float) -> None:
        self._signal, self._ranks, self.grace = signal_, ranks, grace
        self._agreed: str | None = None
        self._moved, self._patient = time.monotonic(), False

    @property
    def requested(self) -> str | None:
        return self._signal.requested if self._ranks.alone else self._agreed

    def agree(self, bad: bool = False) -> bool:
        """各 rank 一起调用：停不停从此一致；返回有没有哪个 rank 说 bad。"""
        if self._ranks.alone:
            return bad
        name = self._signal.requested
        mine = 0 if name is None else int(signal.Signals[name])
        number, bad_any = self._ranks.max(torch.tensor([mine, int(bad)])).tolist()
        self._agreed = signal.Signals(number).name if number else None
        self._moved = time.monotonic()
        return bool(bad_any)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """rank 0 在写盘：多久都等。"""
        self._patient = True
        try:
            yield
        finally:
            self._patient, self._moved = False, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """这期间守着：收到信号而又动不了，就退出。"""
        if self._ranks.alone:
            yield
            return
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        since: float | None = None
        while not over.wait(min(1.0, self.grace / 4)):
            if orphaned() and self._signal.requested is None:
                # 起它们的那个被 kill -9 了：没有人再管，存好就走。
                os.kill(os.getpid(), signal.SIGTERM)
            if self._signal.requested is None or self._patient:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - max(since, self._moved) > self.grace:
                text = (
                    f"error: rank {self._ranks.rank} got {self._signal.requested} but waits for "
                    f"other ranks for more than {self.grace:g} s (parallel.grace_s): quitting; "
                    "the newest checkpoint is whole\n"
                )
                with contextlib.suppress(OSError):
                    os.write(sys.stderr.fileno(), text.encode())
                os._exit(BLOCKED)

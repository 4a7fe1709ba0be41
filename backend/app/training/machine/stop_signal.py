"""第一次 Ctrl-C / SIGTERM / SIGHUP 只立一面旗，在步与步之间保存后退出；第二次立即退出。"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(BaseException):
    """at_once 期间收到了信号；不是 Exception，免得被当作编译失败接住。"""


class StopSignal:
    """`with StopSignal() as stop:` 期间接管信号；`stop.requested` 是收到的信号名。"""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # signal.signal 只能在主线程调用；在别的线程里训练时由调用者负责停止。
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                # nohup 令 SIGHUP 被忽略，那是用户的意思。
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """这期间的信号立即打断：编译要几十秒，又没有什么可失去的。

        Raises:
            Interrupted: 收到了信号，或之前已经收到。
        """
        self._at_once = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(130)
        self.requested = signal.Signals(number).name
        # 终端已关（SIGHUP）时写不出去，而保存不该因此失败。
        with contextlib.suppress(OSError, RuntimeError):
            os.write(
                sys.stderr.fileno(),
                f"\n{self.requested}: saving after this step; once more quits at once\n".encode(),
            )
        if self._at_once:
            raise Interrupted

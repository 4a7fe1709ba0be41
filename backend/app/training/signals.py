"""第一次 Ctrl-C / SIGTERM / SIGHUP 只立一面旗，在步与步之间保存后退出；第二次立即退出。"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class StopSignal:
    """`with StopSignal() as stop:` 期间接管信号；`stop.requested` 是收到的信号名。"""

    def __init__(self) -> None:
        self.requested: str | None = None
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

"""uvicorn 没有的两件事：收请求的时限（慢吞吞的连接占着不放），与有秩序的关门。"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.serving.api.errors import ApiError


class Deadlined(H11Protocol):
    """从头一个字节（新连接则从接通）起，这么多秒之内要收完整个请求；生成不算在内。"""

    seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        # 它的访问日志写出整条路径与查询串，那里可能是用户的话；门自己记（gate.py）。
        self.access_log = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:
            self._arm()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.conn.their_state is not h11.SEND_BODY:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """不是 HTTP 的请求，错误也是同一种形状。"""
        error = ApiError(400, "invalid_request", "this is not a valid HTTP request")
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"),
                   (b"content-length", str(len(body)).encode())]  # fmt: skip
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Draining(uvicorn.Server):
    """第一次 SIGTERM 或 SIGINT：drain 做完再退，退出码 0；第二次：立刻退。"""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Any]) -> None:
        super().__init__(config)
        self._drain = drain
        self._asked = 0
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn 的写法在最后把信号再发一次，退出码就成了 -15。"""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._asked += 1
        if self._asked > 1:
            self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked and self._task is None:
            self._task = asyncio.create_task(self._close())
        return await super().on_tick(counter)

    async def _close(self) -> None:
        await self._drain()
        self.should_exit = True

"""HTTP 的循环与引擎的线程之间：投请求、收事件、走开就取消。

引擎一步的全部事件合成一次 call_soon_threadsafe：逐个叫醒循环，GIL 来回的时间比算还多。
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from app.serving.api.errors import ApiError, failed
from app.serving.api.metrics import Metrics
from app.serving.api.orders import Job
from app.serving.request import Event, Order
from app.serving.worker import Worker

# 读的一方落后这么久就放弃它：不让一个不读的人占着行。
_BEHIND = 10.0


@dataclass(frozen=True)
class Timeouts:
    """queue：至多排队多久；whole：一个请求至多多久；drain：关门时等在写的多久；ping：流里
    没有话说时隔多久送一个空行。"""

    queue: float = 60.0
    whole: float = 300.0
    drain: float = 30.0
    ping: float = 15.0


@dataclass
class Ticket:
    """一个请求的收件箱。"""

    id: int
    job: Job
    born: float = field(default_factory=time.monotonic)
    queue: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    left: int = 0
    oldest: float | None = None
    seen: dict[int, float] = field(default_factory=dict)
    overdue: Callable[[], object] | None = None


class Hub:
    """一个进程一个；除了 deliver，都在事件循环里调用。"""

    def __init__(self, worker: Worker, metrics: Metrics, timeouts: Timeouts) -> None:
        self.worker, self.metrics, self.timeouts = worker, metrics, timeouts
        self.closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tickets: dict[int, Ticket] = {}
        self._ids = itertools.count(1)
        self._coming = 0
        worker.coming = lambda: self._coming

    @contextmanager
    def coming(self) -> Iterator[None]:
        """里面的请求已收齐、还没有 submit：引擎等一等它。"""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    @property
    def open(self) -> int:
        return len(self._tickets)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def deliver(self, events: Sequence[Event]) -> None:
        """引擎的线程调用。"""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, events)

    def submit(self, job: Job) -> Ticket:
        """
        Raises:
            ApiError: 503，在关门。
        """
        if self.closing:
            raise failed("closing")
        ticket = Ticket(next(self._ids), job, left=len(job.asks))
        self._tickets[ticket.id] = ticket
        now, limits, engine = time.monotonic(), self.timeouts, job.served.engine
        order = Order(ticket.id, job.asks, now + limits.queue, now + limits.whole)
        self.worker.post(lambda: engine.submit(order))
        return ticket

    def cancel(self, ticket: Ticket, where: str) -> None:
        """不要了；写完了的、取消过的也无妨。"""
        if self._tickets.pop(ticket.id, None) is None:
            return
        self.metrics.cancelled(where)
        engine = ticket.job.served.engine
        self.worker.post(lambda: engine.cancel(ticket.id))

    async def events(self, ticket: Ticket) -> AsyncIterator[Event | None]:
        """到每一段都写完为止；None = 好一会儿没有话说（该 ping 了）。

        Raises:
            ApiError: 引擎没有写完：为什么。
        """
        while ticket.left:
            try:
                event = await asyncio.wait_for(ticket.queue.get(), self.timeouts.ping)
            except TimeoutError:
                yield None
                continue
            ticket.oldest = None if ticket.queue.empty() else time.monotonic()
            if event.failure is not None:
                self._tickets.pop(ticket.id, None)
                error: ApiError = failed(event.failure)
                self.metrics.rejected(error.status)
                raise error
            if event.ended:
                ticket.left -= 1
                if not ticket.left:
                    self._tickets.pop(ticket.id, None)
                self.metrics.finished(str(event.finish), time.monotonic() - ticket.born)
            yield event

    def _sort(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        for event in events:
            ticket = self._tickets.get(event.order)
            if ticket is None:
                continue
            if event.tokens:
                before = ticket.seen.get(event.index)
                self.metrics.token(
                    now - (ticket.born if before is None else before), before is None
                )
                ticket.seen[event.index] = now
            ticket.oldest = now if ticket.oldest is None else ticket.oldest
            ticket.queue.put_nowait(event)
            if now - ticket.oldest > _BEHIND:
                self.cancel(ticket, "slow_reader")
                if ticket.overdue is not None:
                    ticket.overdue()

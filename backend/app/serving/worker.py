"""引擎的线程：模型、缓存与一切 torch 的调用都在这里，别处只投信与收信。

HTTP 的循环投一个动作进信箱；每一轮各引擎走一步，事件合成一次送出。取消、开门、关门都是
两步之间的信，所以没有锁跨过前向，也没有人在半路改状态。看里面的活（tasks.py）排在各步之间，
一轮至多 max_stall 秒。
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from app.serving.engine import Engine
from app.serving.request import Event
from app.serving.tasks import Tasks

_LOG = logging.getLogger(__name__)
# 这么久没有走完一步就是卡住了；步子本来就慢的模型按预计的倍数。
_HUNG, _TIMES = 10.0, 20
# 同来的请求，两个之间一般不到这么多秒；已收到、还在分词的，至多等这么多秒。
_NEXT, _COMING = 0.03, 0.25


class Closing(Exception):
    """关门时手上的活没有做完。"""


class Worker:
    """engines：模型名 -> 引擎。deliver 在引擎的线程里调用，要立刻返回。"""

    def __init__(
        self, engines: Mapping[str, Engine], deliver: Callable[[Sequence[Event]], None]
    ) -> None:
        self.engines, self._deliver = engines, deliver
        self.tasks = Tasks()
        self._inbox: list[Callable[[], object]] = []
        self._wake = threading.Condition()
        self._stop = False
        self._beat = time.monotonic()
        # 已经收到、还没有投来的请求数：HTTP 的循环来填。
        self.coming: Callable[[], int] = lambda: 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, act: Callable[[], object]) -> None:
        """在两步之间做这件事。"""
        with self._wake:
            self._inbox.append(act)
            self._wake.notify()

    def abandon(self) -> None:
        """在写的都不等了：要关门。"""
        for engine in self.engines.values():
            self.post(partial(self._give_up, engine))
        self.post(lambda: self.tasks.drop_all(Closing()))

    def stop(self) -> None:
        """走完手上的一步就停。"""
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join(timeout=5)

    def trouble(self) -> str | None:
        """为什么现在不能接活；None = 可以。"""
        if not self._thread.is_alive():
            return "the engine thread is not running"
        slowest = max(e.costs.seconds(e.limits.pace.chunk) for e in self.engines.values())
        silent = time.monotonic() - self._beat
        if self._working() and silent > max(_HUNG, _TIMES * slowest):
            return f"the engine has not finished a step for {silent:.0f} s"
        return None

    def _working(self) -> bool:
        busy = self.tasks.busy or any(engine.busy for engine in self.engines.values())
        return bool(self._inbox) or busy

    def _run(self) -> None:
        while True:
            idle = False
            with self._wake:
                while not self._stop and not self._working():
                    idle = True
                    self._wake.wait()
                    self._beat = time.monotonic()
                if self._stop:
                    return
            self._read()
            if idle:
                self._await_company()
            self.round()
            self._beat = time.monotonic()

    def _read(self) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, []
        for act in inbox:
            self._guarded(act)

    def _await_company(self) -> None:
        """一群请求总有先后：头一个一来就读的话，别的就要等它，再挤在写的旁边慢慢读。已在路上的都等，
        还没有看见的只等一小会儿。"""
        start = time.monotonic()
        while not self._stop:
            worth, coming = max(e.company for e in self.engines.values()), self.coming()
            left = start + (_COMING if worth and coming else worth) - time.monotonic()
            if left <= 0:
                return
            with self._wake:
                if not self._inbox:
                    self._wake.wait(min(_NEXT, left))
                if not self._inbox and not coming:
                    return
            self._read()

    def round(self) -> None:
        """各引擎一步，说出事件，再做几片看里面的活。"""
        events: list[Event] = []
        for engine in self.engines.values():
            if engine.busy:
                events += self._step(engine)
        if events:
            self._deliver(events)
        self.tasks.run(min(e.limits.pace.max_stall for e in self.engines.values()))

    def _give_up(self, engine: Engine) -> None:
        self._deliver(engine.abandon("closing"))

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:
            _LOG.exception("a message to the engine failed")

    def _step(self, engine: Engine) -> list[Event]:
        try:
            return engine.step()
        except Exception:
            # 引擎自己的错：手上的请求都得到错误，后来的照常。
            _LOG.exception("a step of the engine failed")
            return engine.abandon("internal")

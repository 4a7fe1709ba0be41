"""把各件装成一个 HTTP 程序。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from app.serving.api.assets import Assets
from app.serving.api.connection import Deadlined, Draining
from app.serving.api.errors import ApiError
from app.serving.api.gate import Gate
from app.serving.api.hub import Hub, Timeouts
from app.serving.api.inside.routes import Inside
from app.serving.api.metrics import Metrics
from app.serving.api.routes import Routes
from app.serving.request import Event
from app.serving.served import Served
from app.serving.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """hosts：Host 头里另外许可的名字；keys：钥匙，空 = 不要；inspect：许不许看里面。"""

    host: str = "127.0.0.1"
    port: int = 8080
    hosts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    inspect: bool = True


class Service:
    """worker 与 app：前者是引擎的线程，后者是 ASGI 程序。"""

    def __init__(self, models: Sequence[Served], address: Address | None = None) -> None:
        self.address = address = address or Address()
        served = {one.name: one for one in models}
        metrics = Metrics(served)

        def deliver(events: Sequence[Event]) -> None:
            self.hub.deliver(events)

        self.worker = Worker({name: one.engine for name, one in served.items()}, deliver)
        self.hub = Hub(self.worker, metrics, address.timeouts)
        self.api = FastAPI(
            title="gpt2-workbench", openapi_url=None, docs_url=None, redoc_url=None,
            lifespan=self._lifespan,
        )  # fmt: skip
        page, inspect = Assets(), address.inspect
        routes = Routes(served, self.hub, metrics, inspect, page.version)
        for each in (routes, Inside(served, self.hub, inspect), page):
            self.api.include_router(each.router())
        self.api.add_exception_handler(ApiError, _refused)
        self.api.add_exception_handler(HTTPException, _refused)
        self.api.add_exception_handler(Exception, _broken)
        hosts = (*LOOPBACK, address.host, *address.hosts)
        self.app = Gate(self.api, address.keys, hosts)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.hub.bind(asyncio.get_running_loop())
        self.worker.start()
        yield
        self.worker.stop()

    async def drain(self) -> None:
        """不收新的，排队的不做了，在写的等一会儿；再久就放弃。"""
        self.hub.closing = True
        for engine in self.worker.engines.values():
            self.worker.post(engine.close_queue)
        loop = asyncio.get_running_loop()
        until = loop.time() + self.address.timeouts.drain
        while self.hub.open and loop.time() < until:
            await asyncio.sleep(0.05)
        self.worker.abandon()
        # 让最后的错误事件送出去。
        while self.hub.open and loop.time() < until + 2:
            await asyncio.sleep(0.05)

    def server(self) -> Draining:
        """还没有开始的 HTTP 服务器；run() 到收到信号为止。"""
        config = uvicorn.Config(
            self.app, host=self.address.host, port=self.address.port, http=Deadlined, ws="none",
            loop="asyncio", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=30, timeout_graceful_shutdown=3,
        )  # fmt: skip
        return Draining(config, self.drain)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    assert isinstance(error, HTTPException)
    names = {404: "not_found", 405: "method_not_allowed"}
    code = names.get(error.status_code, "invalid_request")
    text = {404: "there is no such route", 405: "this route does not take that method"}
    message = text.get(error.status_code, "the request is not valid")
    return ApiError(error.status_code, code, message, headers=error.headers).response()


async def _broken(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal_error", "the server failed; the log says why").response()

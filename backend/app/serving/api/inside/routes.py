"""看里面的路由：读正文、切成片交给引擎的线程、等、写回去。"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from app.inspection.attention import NotFinite
from app.inspection.slices import Steps
from app.models.transformer import GPT2Model
from app.serving.api.errors import ApiError, failed
from app.serving.api.fields import HistoryBody, InspectBody, parse, schema_of
from app.serving.api.gate import read_body
from app.serving.api.hub import Hub
from app.serving.api.inside.answer import Inspection, write
from app.serving.api.inside.history import (
    MOST_REVIEWS,
    Review,
    checkpoints,
    read_review,
)  # fmt: skip
from app.serving.api.inside.inspect import read_inspection, steps_of
from app.serving.api.inside.packed import check_size
from app.serving.api.orders import pick
from app.serving.api.waiting import SSE_HEADERS, sse, while_there
from app.serving.served import Served
from app.serving.tasks import Task, price
from app.serving.worker import Closing

_LOG = logging.getLogger(__name__)
B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]


class Inside:
    """on：许不许看；从别处连得到的服务默认不许，内部比文字说得更多。"""

    def __init__(self, served: Mapping[str, Served], hub: Hub, on: bool) -> None:
        self.served, self.hub, self.on = served, hub, on
        self._inspecting, self._reviewing = False, 0

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/history", self.checkpoints, methods=["GET"], response_model=None)
        post: dict[str, tuple[Handler, type[BaseModel]]] = {
            "/v1/inspect": (self.inspect, InspectBody),
            "/v1/history": (self.history, HistoryBody),
        }
        for path, (handler, kind) in post.items():
            router.add_api_route(
                path, handler, methods=["POST"], openapi_extra=schema_of(kind), response_model=None
            )
        return router

    async def inspect(self, request: Request) -> Response:
        body = await self._body(request, InspectBody)
        if self._inspecting:
            raise _busy("inspect")
        self._inspecting = True
        try:
            return await while_there(request, self._inspected(body))
        finally:
            self._inspecting = False

    async def _inspected(self, body: InspectBody) -> Response:
        asked = await asyncio.to_thread(self._read, body)
        try:
            found = await self.done(asked.served, steps_of(asked))
            return await asyncio.to_thread(_response, asked, found)
        except NotFinite as error:
            raise ApiError(500, "not_finite", str(error)) from None

    def _read(self, body: InspectBody) -> Inspection:
        return read_inspection(body, pick(self.served, body.model))

    async def checkpoints(self, model: str | None = None) -> Response:
        self._allowed()
        served = pick(self.served, model)
        return JSONResponse(await asyncio.to_thread(checkpoints, served))

    async def history(self, request: Request) -> Response:
        body = await self._body(request, HistoryBody)
        read = lambda: read_review(body, pick(self.served, body.model))  # noqa: E731
        asked = await asyncio.to_thread(read)
        if self._reviewing == MOST_REVIEWS:
            raise _busy("history")
        return StreamingResponse(
            self._reviewed(asked), media_type="text/event-stream", headers=SSE_HEADERS
        )

    async def _reviewed(self, asked: Review) -> AsyncIterator[str]:
        """一个检查点一个检查点地读，用完一个再读下一个：内存里至多一个。"""
        if self._reviewing == MOST_REVIEWS:
            yield sse(_busy("history").body())
            return
        self._reviewing += 1
        try:
            for number, step in enumerate(asked.steps):
                yield sse({"done": number, "of": len(asked.steps)})
                await self._review(asked, step)
            yield sse({"done": len(asked.steps), "of": len(asked.steps)})
            yield sse(asked.result())
        except ApiError as error:
            yield sse(error.body())
        finally:
            self._leave()

    async def _review(self, asked: Review, step: int) -> None:
        """一个检查点：读、看；走出这里，它就不在内存里了。

        问的人走了，线程仍要读完才停：名额由它占着，读完才还。
        """
        # 不作 future 的结果：那个对象何时消失不由这里定。
        held: list[GPT2Model | None] = []
        loading = asyncio.get_running_loop().run_in_executor(
            None, lambda: held.append(asked.load(step))
        )
        try:
            await asyncio.shield(loading)
        except asyncio.CancelledError:
            self._reviewing += 1
            loading.add_done_callback(self._leave)
            raise
        if (model := held.pop()) is not None:
            await self.done(asked.served, asked.look(step, model))

    def _leave(self, *_: object) -> None:
        self._reviewing -= 1

    async def done(self, served: Served, steps: Steps[Any]) -> Any:
        """在引擎的线程里一片片做完。

        Raises:
            ApiError: 关门、超时，或出了错。
            NotFinite: 模型算出了 NaN。
        """
        loop, engine, worker = asyncio.get_running_loop(), served.engine, self.hub.worker
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        config = engine.model.config
        task = Task(
            steps,
            lambda piece: price(engine.costs, config, piece),
            lambda result, error: loop.call_soon_threadsafe(settle, result, error),
        )
        if self.hub.closing:
            raise failed("closing")
        worker.post(lambda: worker.tasks.add(task))
        try:
            return await asyncio.wait_for(future, self.hub.timeouts.whole)
        except TimeoutError:
            raise failed("deadline") from None
        except Closing:
            raise failed("closing") from None
        except NotFinite:
            raise
        except Exception:
            _LOG.exception("looking inside %s failed", served.name)
            raise failed("internal") from None
        finally:
            worker.post(task.drop)

    async def _body(self, request: Request, kind: type[B]) -> B:
        self._allowed()
        return parse(await read_body(request.scope, request.receive), kind)

    def _allowed(self) -> None:
        if not self.on:
            raise ApiError(
                403, "inspect_off",
                "looking inside is off, as it is when the server listens beyond loopback: start "
                "it with --inspect",
            )  # fmt: skip


def _busy(what: str) -> ApiError:
    """一次只做这么多：每个都占内存，并排做也不会更快。"""
    return ApiError(
        429, f"{what}_busy", f"another {what} runs: try again in a moment",
        headers={"Retry-After": "1"},
    )  # fmt: skip


def _response(asked: Inspection, found: Any) -> Response:
    response = JSONResponse(write(asked, found))
    # 词元的文字有多长，事先只是估计。
    check_size(asked.bytes(), len(response.body))
    return response

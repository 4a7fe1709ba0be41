"""路由。每个都短：读正文、变成引擎的活、等、写回去。"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from app.serving.api.answers import Answer, token_text
from app.serving.api.errors import ApiError, wrong
from app.serving.api.fields import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse,
    schema_of,
)  # fmt: skip
from app.serving.api.gate import read_body
from app.serving.api.hub import Hub, Ticket
from app.serving.api.inside.inspect import limits
from app.serving.api.metrics import Metrics
from app.serving.api.orders import Job, chat_job, check_ids, completion_job, pick
from app.serving.api.waiting import SSE_HEADERS, sse, while_there
from app.serving.served import Served

T = TypeVar("T", bound=BaseModel)
_PIECES = 4096


class Routes:
    """served：名字 -> 模型，只有一个时可以不点名；page：页面的版本。"""

    def __init__(
        self, served: dict[str, Served], hub: Hub, metrics: Metrics, inspect: bool, page: str
    ) -> None:
        self.served, self.hub, self.metrics = served, hub, metrics
        self.inspect, self.page = inspect, page
        # 分词器都相同，就不必点名：lm-eval 的远程分词器不会点名。
        self._same_tokens = len({one.tokenizer.fingerprint() for one in served.values()}) == 1

    def router(self) -> APIRouter:
        router = APIRouter()
        get: dict[str, Callable[..., Awaitable[Response]]] = {
            "/health/live": self.live, "/health/ready": self.ready, "/health": self.ready,
            "/v1/models": self.models, "/v1/models/{name}": self.model, "/props": self.props,
            "/slots": self.slots, "/metrics": self.scrape, "/tokenizer_info": self.tokenizer_info,
        }  # fmt: skip
        post: dict[str, tuple[Callable[..., Awaitable[Response]], type[BaseModel]]] = {
            "/v1/completions": (self.completions, CompletionBody),
            "/v1/chat/completions": (self.chat, ChatBody),
            "/tokenize": (self.tokenize, TokenizeBody),
            "/detokenize": (self.detokenize, DetokenizeBody),
        }
        for path, handler in get.items():
            router.add_api_route(path, handler, methods=["GET"], response_model=None)
        for path, (handler, kind) in post.items():
            router.add_api_route(
                path, handler, methods=["POST"], openapi_extra=schema_of(kind), response_model=None
            )
        return router

    async def live(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """引擎走完步子没有，由它自己的心跳说。"""
        trouble = "the server is shutting down" if self.hub.closing else self.hub.worker.trouble()
        if trouble is not None:
            raise ApiError(503, "not_ready", trouble)
        return JSONResponse({"status": "ok"})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [_card(s) for s in self.served.values()]})

    async def model(self, name: str) -> Response:
        return JSONResponse(_card(pick(self.served, name)))

    async def props(self) -> Response:
        facts = {
            name: served.facts() | {"inspect": self.inspect, "inspect_limits": limits(served)}
            for name, served in self.served.items()
        }
        return JSONResponse({"models": facts, "page_version": self.page})

    async def slots(self) -> Response:
        """各行在做什么；没有文字。"""
        rows = []
        for name, served in self.served.items():
            rows += [{"model": name, **slot} for slot in served.engine.slots()]
        return JSONResponse(rows)

    async def scrape(self) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def tokenizer_info(self, model: str | None = None) -> Response:
        """lm-eval 的远程分词器要的。"""
        served = self._speaker(model)
        tokenizer = served.tokenizer
        end = tokenizer.document_separator
        eos = None if end is None else token_text(tokenizer, end)
        start = tokenizer.start_ids
        return JSONResponse(
            {
                "tokenizer_class": tokenizer.kind,
                "eos_token": eos,
                "eos_token_id": end,
                "bos_token": token_text(tokenizer, start[0]) if start else None,
                "pad_token": None,
                "vocab_size": tokenizer.vocab_size,
                "chat_template": served.template.source if served.template else None,
            }
        )

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        if (body.prompt is None) == (body.content is None):
            raise wrong("prompt", "give either prompt or content")
        served = self._speaker(body.model)
        text = (body.prompt or "") + (body.content or "")
        encode = served.tokenizer.encode
        if body.add_special_tokens:
            encode = served.tokenizer.encode_prompt
        try:
            ids = await asyncio.to_thread(encode, text)
        except ValueError:
            raise wrong("prompt", "the tokenizer of this model cannot encode this text") from None
        found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
        if body.with_pieces:
            found["pieces"] = _pieces(served, ids)
        return JSONResponse(found)

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        served = self._speaker(body.model)
        check_ids("tokens", body.tokens, served)
        text = await asyncio.to_thread(served.tokenizer.decode, body.tokens)
        found: dict[str, Any] = {"prompt": text, "content": text}
        if body.with_pieces:
            found["pieces"] = _pieces(served, body.tokens)
        return JSONResponse(found)

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        space = request.state.space
        with self.hub.coming():
            job = await asyncio.to_thread(
                lambda: completion_job(body, pick(self.served, body.model), space)
            )
        return await self._answer(request, job, bool(body.stream), False)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        space = request.state.space
        with self.hub.coming():
            job = await asyncio.to_thread(
                lambda: chat_job(body, pick(self.served, body.model), space)
            )
        return await self._answer(request, job, bool(body.stream), True)

    async def _body(self, request: Request, kind: type[T]) -> T:
        return parse(await read_body(request.scope, request.receive), kind)

    def _speaker(self, name: str | None) -> Served:
        """用谁的分词器。"""
        if name is None and self._same_tokens:
            return next(iter(self.served.values()))
        return pick(self.served, name)

    async def _answer(self, request: Request, job: Job, stream: bool, chat: bool) -> Response:
        answer, ticket = Answer(job, chat), self.hub.submit(job)
        events = self.hub.events(ticket)
        try:
            if not stream:
                await while_there(request, _gather(events, answer))
                return JSONResponse(answer.whole())
            # 头一个事件之前失败，还可以用正经的状态码说。
            first = await while_there(request, _next(events))
        except BaseException:
            self.hub.cancel(ticket, "running")
            raise
        body = self._stream(ticket, events, answer, first)
        return StreamingResponse(body, media_type="text/event-stream", headers=SSE_HEADERS)

    async def _stream(
        self, ticket: Ticket, events: AsyncIterator[Any], answer: Answer, event: Any
    ) -> AsyncIterator[str]:
        task = asyncio.current_task()
        ticket.overdue = None if task is None else task.cancel
        try:
            for chunk in answer.opening():
                yield sse(chunk)
            while True:
                # 好一会儿没有话说：一行注释，免得中间的代理断线。
                yield ": ping\n\n" if event is None else sse(answer.chunk(event))
                event = await anext(events)
        except StopAsyncIteration:
            if answer.job.usage:
                yield sse(answer.last())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield sse(error.body())
        finally:
            ticket.overdue = None
            self.hub.cancel(ticket, "stream")


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.created,
        "owned_by": "gpt2-workbench", "max_model_len": served.context,
    }  # fmt: skip


def _pieces(served: Served, ids: list[int]) -> list[dict[str, Any]]:
    tokenizer = served.tokenizer
    return [
        {"id": i, "text": token_text(tokenizer, i), "bytes": list(tokenizer.token_bytes(i))}
        for i in ids[:_PIECES]
    ]


async def _gather(events: AsyncIterator[Any], answer: Answer) -> None:
    async for event in events:
        if event is not None:
            answer.take(event)


async def _next(events: AsyncIterator[Any]) -> Any:
    return await anext(events)

"""等一件事做完，除非问的人走了；与流里一项怎样写。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request

from app.serving.api.errors import ApiError

R = TypeVar("R")
# 中间的代理不要攒着。
SSE_HEADERS = {"X-Accel-Buffering": "no"}


def sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def while_there(request: Request, work: Awaitable[R]) -> R:
    """做 work，直到做完或问的人走了。

    Raises:
        ApiError: 走了；没有人会读到它。
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "client_closed_request", "the client went away")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""错误只有一种形状，而且从不带着用户写的内容。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from app.serving.request import Failure

_TYPES = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "server_error",
}  # fmt: skip


class ApiError(Exception):
    """code：给程序看的名字；param：哪个字段。"""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        inside = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": inside}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def wrong(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400。"""
    return ApiError(400, code, message, param)


_FAILURES: dict[Failure, tuple[int, str, str]] = {
    "internal": (500, "internal_error", "this request failed in the model; others go on"),
    "full": (429, "queue_full", "the server is busy: the queue is full, try again later"),
    "deadline": (504, "deadline_exceeded", "the request took longer than the server allows"),
    "closing": (503, "shutting_down", "the server is shutting down"),
}


def failed(failure: Failure) -> ApiError:
    status, code, message = _FAILURES[failure]
    return ApiError(status, code, message, headers={"Retry-After": "1"} if status == 429 else None)

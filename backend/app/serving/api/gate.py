"""每个请求先过的门：主机名、钥匙、大小、类型；每个回答都带的头。纯 ASGI，不缓冲流。"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.api.errors import ApiError

MAX_BODY = 1024 * 1024
# 同时在里面的请求；队列之外还有读正文的、看指标的。
MAX_INSIDE = 512
_OPEN = ("/health", "/health/live", "/health/ready")
_LOG = logging.getLogger("app.serving.access")


class Gate:
    """keys：空 = 不要钥匙；hosts：Host 头里许可的名字（防 DNS 改绑）。"""

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._hosts = {host.lower() for host in hosts}
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if all(name != b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
                # 只记路由与代码：查询串与正文都可能是用户的话。
                _LOG.info("%s %s %s", request_id, scope["method"], message["status"])
            await send(message)

        self._inside += 1
        try:
            scope.setdefault("state", {})["space"] = self._check(scope)
            await self._app(scope, receive, stamped)
        except ApiError as error:
            await error.response()(scope, receive, stamped)
        finally:
            self._inside -= 1

    def _check(self, scope: Scope) -> str:
        """这把钥匙的名字空间；只有一把或没有，大家同一个。"""
        if self._inside > MAX_INSIDE and scope["path"] not in _OPEN:
            # 数的是请求，不是连接：闲着的连接不该挤走要问的人。
            raise ApiError(
                503, "too_many_requests_open", "too many requests are open: try again later",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name is None or name.lower() not in self._hosts:
            raise ApiError(
                421, "host_not_allowed",
                "this Host is not served here: start the server with --allow-host NAME",
            )  # fmt: skip
        if not self._keys or scope["path"] in _OPEN or _is_page(scope["path"]):
            return ""
        given = headers.get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # 每把都比，时间不随哪一把、对了几个字而变。
        found = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(found):
            raise ApiError(
                401, "invalid_api_key", "give an API key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return hashlib.sha256(key.strip()).hexdigest()[:16] if len(self._keys) > 1 else ""


def _is_page(path: str) -> bool:
    """页面自己的文件：人人相同的代码，没有模型的东西；钥匙由人在页面上给。"""
    return path == "/" or path.startswith("/assets/")


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """
    Raises:
        ApiError: 415 不是 JSON，413 太大（不信 Content-Length，数着收）。
    """
    headers: dict[bytes, bytes] = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(
            415, "unsupported_media_type",
            "send JSON: with curl, add -H 'Content-Type: application/json'",
        )  # fmt: skip
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > MAX_BODY:
        raise _too_large()
    body = bytearray()
    while True:
        message: dict[str, Any] = dict(await receive())
        if message["type"] == "http.disconnect":
            raise ApiError(400, "disconnected", "the connection was closed")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _too_large() -> ApiError:
    return ApiError(
        413, "body_too_large", f"the body is larger than {MAX_BODY} bytes",
        headers={"Connection": "close"},
    )  # fmt: skip

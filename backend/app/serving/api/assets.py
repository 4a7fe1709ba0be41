"""页面的文件：开张时读一次，内容的哈希就是版本；头里只许它问自己这一家。"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.serving.api.errors import ApiError

FOLDER = Path(__file__).parents[1] / "page"
_KINDS = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
}  # fmt: skip
# 写着版本的地方；文件里就是这个词，所以没有构建这一步。
_VERSION = 'content="VERSION"'
# 模型的文字是别人写的：即使哪里写错了，也没有脚本、样式、图、框与别处的地址可以用。
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # 浏览器可以留着，但每次都问一声：重启之后不会用着旧的。
    "Cache-Control": "no-cache",
}


class Assets:
    """version：全部文件的哈希；/props 也说它，开着的旧页面就知道自己旧了。"""

    def __init__(self, folder: Path = FOLDER) -> None:
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in _KINDS
        }
        digest = hashlib.sha256()
        for name, data in files.items():
            digest.update(f"{name} {len(data)}\n".encode() + data)
        self.version = digest.hexdigest()[:16]
        index = files["index.html"].decode()
        files["index.html"] = index.replace(_VERSION, f'content="{self.version}"').encode()
        self._files = files

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/", self.index, methods=["GET"], response_model=None)
        router.add_api_route(
            "/assets/{name:path}", self.asset, methods=["GET"], response_model=None
        )
        return router

    async def index(self, request: Request) -> Response:
        return self._answer("index.html", request)

    async def asset(self, name: str, request: Request) -> Response:
        """name 只在读过的文件里找，从不去碰磁盘。"""
        if name not in self._files:
            raise ApiError(404, "not_found", "the page has no such file")
        return self._answer(name, request)

    def _answer(self, name: str, request: Request) -> Response:
        data = self._files[name]
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {**_HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=_KINDS[Path(name).suffix], headers=headers)

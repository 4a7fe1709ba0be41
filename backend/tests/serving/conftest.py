"""HTTP 的测试共用一个服务：种子固定的小模型，在后台的线程里。"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.serving.api.app import Address, Service
from app.serving.api.template import Jinja
from app.serving.engine import Limits
from app.serving.served import Served, serve_model
from tests.serving.helpers import BYTES, byte_model

CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant:"
)


@dataclass(frozen=True)
class Running:
    url: str
    service: Service
    served: dict[str, Served]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def idle(self, seconds: float = 10.0) -> None:
        """等到没有一行在忙；等不到就是有一行卡住了。"""
        until = time.monotonic() + seconds
        while any(one.engine.busy for one in self.served.values()) or self.service.hub.open:
            assert time.monotonic() < until, "a row is stuck"
            time.sleep(0.005)


@contextmanager
def serving(
    models: list[Served], address: Address | None = None, port: int = 0
) -> Iterator[Running]:
    service = Service(models, replace(address or Address(), port=port))
    server = service.server()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < until and thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service, {m.name: m for m in models})
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def tiny(name: str = "tiny", **options: Any) -> Served:
    torch.manual_seed(7)
    changes = options.pop("changes", {})
    model = byte_model(context_size=128, **changes)
    return serve_model(name, model, BYTES, **{"rows": 4, "limits": Limits(), **options})


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """两个模型：tiny 有对话模板，other 没有；float64，所以文字处处可比。"""
    with serving([replace(tiny(), template=Jinja(CHAT))]) as running:
        yield running


@pytest.fixture
def server(tiny_server: Running) -> Iterator[Running]:
    """用完要回到没有事做。"""
    yield tiny_server
    tiny_server.idle()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("served") / "mine"
    byte_model(torch.float32, context_size=128).save_pretrained(folder)
    BYTES.save(folder)
    return folder

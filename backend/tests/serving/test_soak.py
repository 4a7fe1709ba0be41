"""服务久了与乱来：两千个混着的请求，按 OpenAPI 造出的请求。"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.serving.engine import Limits
from tests.serving.conftest import Running, serving, tiny
from tests.serving.test_http import PATH, complete

BACKEND = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_thousand_mixed_requests() -> None:
    """D16：五分之一半路走开；没有卡住的行，词元不多不少，内存不长。"""
    import psutil

    with serving([tiny(rows=8, limits=Limits(queue=200), guess="ngram")]) as running:
        counts, process = running.served["tiny"].engine.counts, psutil.Process()
        got = [0]

        async def wave(count: int, seed: int) -> None:
            rng = random.Random(seed)
            limits, gate = httpx.Limits(max_connections=24), asyncio.Semaphore(24)
            async with httpx.AsyncClient(
                base_url=running.url, trust_env=False, timeout=60, limits=limits
            ) as client:

                async def one(i: int) -> None:
                    body: dict[str, Any] = {
                        "prompt": f"{rng.choice('abc')} number {i % 40}",
                        "n": rng.choice([1, 1, 2]), "max_tokens": rng.randint(1, 30), "seed": i,
                        "stream": rng.random() < 0.5, "echo": rng.random() < 0.1,
                    }  # fmt: skip
                    if rng.random() < 0.1:
                        body["logprobs"] = 2
                    wait = rng.uniform(0.0, 0.2) if rng.random() < 0.2 else 60.0
                    try:
                        # 四百个一起排在 httpx 的池里，它自己就占满一个核。
                        async with gate:
                            await asyncio.wait_for(client.post(PATH, json=body), wait)
                    except TimeoutError:
                        return
                    got[0] += 1

                await asyncio.gather(*(one(i) for i in range(count)))

        asyncio.run(wave(400, 0))
        running.idle()
        before = process.memory_info().rss
        for part in range(4):
            asyncio.run(wave(400, part + 1))
            running.idle()
        assert process.memory_info().rss - before < 30 * 2**20
        assert got[0] > 1500 and counts.made > 0
        assert complete(running, prompt="a", max_tokens=3)["choices"]


@pytest.mark.slow
def test_schemathesis_finds_nothing(tiny_server: Running) -> None:
    """D1：按 OpenAPI 造出的请求，没有 5xx，错误都是同一种形状。"""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_dict(tiny_server.service.api.openapi())
    seen = 0
    for operation in schema.get_all_operations():
        made = operation.ok()

        @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=made.as_strategy())
        def attack(case: Any) -> None:
            nonlocal seen
            response = case.call(base_url=tiny_server.url, timeout=30)
            seen += 1
            assert response.status_code < 500, (case.body, response.content)
            if response.status_code >= 400:
                assert set(json.loads(response.content)["error"]) == {
                    "message", "type", "param", "code",
                }  # fmt: skip

        attack()
    assert seen > 150
    tiny_server.idle()


def test_nothing_here_is_global() -> None:
    """B7：没有全局的随机源，没有全局的停止标志。"""
    for path in (BACKEND / "app" / "serving").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.manual_seed" not in text and "\nglobal " not in text, path

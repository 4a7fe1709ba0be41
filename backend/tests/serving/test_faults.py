"""服务坏的时候：走开的、慢的、太多的、没有钥匙的、卡住的、关门的（practice 5 D）。"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from app.serving.api.app import Address
from app.serving.api.connection import Deadlined
from app.serving.api.hub import Timeouts
from app.serving.engine import Limits
from app.serving.flat_step import FlatStep
from tests.serving.conftest import Running, serving, tiny
from tests.serving.helpers import KEYS, LONG
from tests.serving.test_http import PATH, check_error, complete


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """每步慢一点，好在半路走开。"""
    real = FlatStep.__call__

    def step(self: Any, *args: Any, **given: Any) -> Any:
        time.sleep(seconds)
        return real(self, *args, **given)

    monkeypatch.setattr(FlatStep, "__call__", step)


@pytest.fixture
def slow_server(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    slow(monkeypatch)
    yield server


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_rows(slow_server: Running, stream: bool) -> None:
    """D6：流与不是流的，n 大于 1，在排队的：走开之后行空出来，步子也停。"""
    wanted = complete(slow_server, prompt="stay", max_tokens=30, seed=1, ignore_eos=True)
    counts = slow_server.served["tiny"].engine.counts
    stayed: list[Any] = []
    stay = threading.Thread(
        target=lambda: stayed.append(
            complete(slow_server, prompt="stay", max_tokens=30, seed=1, ignore_eos=True)
        )
    )
    stay.start()
    rng = random.Random(3)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow_server.url, trust_env=False) as client:

            async def one(n: int) -> None:
                body = {**LONG, "n": n, "stream": stream}
                try:
                    await asyncio.wait_for(client.post(PATH, json=body), rng.uniform(0.05, 0.3))
                except TimeoutError:
                    return
                raise AssertionError("the answer came too soon to leave")

            await asyncio.gather(*(one(1 + i % 3) for i in range(8)))

    asyncio.run(leave())
    stay.join()
    slow_server.idle(30)
    made = counts.made
    time.sleep(0.1)
    assert counts.made == made
    assert stayed[0]["choices"] == wanted["choices"]


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """D7：一行、队长四，三十个一起：做了的与 429 的一共三十，429 都说何时再来。"""
    with serving([tiny(rows=1, limits=Limits(queue=4))]) as running:
        slow(monkeypatch, 0.01)

        async def everyone() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=running.url, trust_env=False, timeout=30) as c:
                body = {"prompt": "x", "max_tokens": 12, "ignore_eos": True}
                return await asyncio.gather(*(c.post(PATH, json=body) for _ in range(30)))

        answers = asyncio.run(everyone())
        full = [a for a in answers if a.status_code == 429]
        assert len(full) + sum(a.status_code == 200 for a in answers) == 30
        assert 4 <= 30 - len(full) <= 8 and all(int(a.headers["retry-after"]) >= 1 for a in full)
        for answer in full:
            assert check_error(answer, 429) == "queue_full"
        running.idle()


def test_deadlines_end_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """D8：不是流的 504；流的在半路说错误，没有 [DONE]；行空出来。"""
    timeouts = Timeouts(whole=0.4, queue=0.2)
    with serving([tiny(rows=1)], Address(timeouts=timeouts)) as running:
        slow(monkeypatch)
        response = running.post(PATH, LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (
            504, "deadline_exceeded",
        )  # fmt: skip
        text = running.post(PATH, {**LONG, "stream": True}).text
        last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "deadline_exceeded" and "[DONE]" not in text
        running.idle()


def test_a_reader_that_never_reads_is_left(
    slow_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5：不读的一方落后太久，就不再为他写。"""
    monkeypatch.setattr("app.serving.api.hub._BEHIND", 0.3)
    monkeypatch.setattr("app.serving.api.routes.sse", lambda value: "x" * 300_000)
    host, port = slow_server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as reader:
        reader.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        time.sleep(0.2)
        slow_server.idle(8)


def test_slow_senders_are_cut_off(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    """D4：不出声的、头写一半的、正文写一半的；正常的请求照常。"""
    monkeypatch.setattr(Deadlined, "seconds", 0.4)
    host, port = server.url.removeprefix("http://").split(":")
    starts = [b"", b"POST /v1/completions HTTP/1.1\r\nHost: local", (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 90\r\n\r\n{")]  # fmt: skip
    open_ones = []
    for start in starts * 5:
        one = socket.create_connection((host, int(port)))
        one.sendall(start)
        open_ones.append(one)
    assert complete(server, prompt="a", max_tokens=2)["choices"]
    for one in open_ones:
        one.settimeout(5)
        try:
            while one.recv(4096):
                pass
        except ConnectionResetError:
            pass
        one.close()


def test_too_many_at_once_are_told_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.api.gate.MAX_INSIDE", 0)
    response = server.post(PATH, {"prompt": "a"})
    assert check_error_5(response) == "too_many_requests_open"
    assert server.get("/health/live").status_code == 200


@pytest.mark.parametrize("length", [True, False])
def test_huge_bodies_are_not_kept(server: Running, length: bool) -> None:
    """D3：一百兆，有没有 Content-Length 都在一兆之后拒绝。"""

    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    if length:
        headers["content-length"] = str(100 * 2**20)
    # 它可能已经说完并关上了，我们还在写。
    with server.client() as client, suppress(httpx.WriteError):
        check_error(client.post(PATH, content=body(), headers=headers), 413)
    assert complete(server, prompt="a", max_tokens=1)["choices"]


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving([tiny(rows=2)], Address(keys=KEYS)) as running:
        yield running


def test_every_route_asks_for_the_key(locked: Running) -> None:
    """D10。"""
    get = ("/v1/models", "/v1/models/tiny", "/props", "/slots", "/metrics", "/tokenizer_info",
           "/docs", "/openapi.json", "/v1/history")  # fmt: skip
    post = (PATH, "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/inspect", "/v1/history")
    routes = [*(("GET", path) for path in get), *(("POST", path) for path in post)]
    wrong = [None, "Bearer nope", f"Bearer {KEYS[0][:-1]}", f"Basic {KEYS[0]}", "Bearer",
             b"Bearer \xc3\xa9\xff"]  # fmt: skip
    with locked.client() as client:
        # 页面是静态的，没有钥匙也打得开；它问的每一条路都要。
        assert client.get("/").status_code == 200
        for method, path in routes:
            for key in wrong:
                headers = {} if key is None else {"authorization": key}
                response = client.request(method, path, headers=headers)  # type: ignore[arg-type]
                assert check_error(response, 401) == "invalid_api_key"
            right = client.request(method, path, headers={"authorization": f"Bearer {KEYS[1]}"})
            assert right.status_code != 401
        assert client.get("/health/ready").status_code == 200


def test_keys_do_not_share_prefixes(locked: Running) -> None:
    """两把钥匙之间借不到前缀：从快慢里也测不出别人问过什么。"""
    cached = []
    for key in (KEYS[0], KEYS[1], KEYS[0]):
        body = {"prompt": "the same long beginning of it", "max_tokens": 1}
        answer = locked.post(PATH, body, headers={"authorization": f"Bearer {key}"}).json()
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[1] == 0 and cached[2] > 0


def test_prompts_are_not_logged(
    server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D13：成的与不成的，日志、指标与错误里都没有提示。"""
    canary, bodies = "CANARY-7f3a", [{}, {"n": 99}, {"stop": ["CANARY-7f3a" * 40]}, {"x": 1}]
    caplog.set_level(logging.DEBUG)
    with server.client() as client:
        for body in bodies * 5:
            response = client.post(PATH, json={"prompt": canary, "max_tokens": 2, **body})
            assert response.status_code == 200 or canary not in response.text
        client.get(f"/v1/models/{canary}?q={canary}")
        assert canary not in client.get("/metrics").text
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert canary not in "\n".join(record.getMessage() for record in ours)


def test_a_step_that_raises_and_one_that_hangs(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D9：引擎自己出错，手上的得到 500，后来的照常；卡住了 ready 说实话，live 不受累。"""
    engine = server.served["tiny"].engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_turns", lambda: 1 / 0)
        response = server.post(PATH, {"prompt": "a"})
        assert response.status_code == 500 and "division" not in response.text
    assert complete(server, prompt="a", max_tokens=2)["choices"]
    hung = threading.Event()
    monkeypatch.setattr("app.serving.worker._HUNG", 0.1)
    monkeypatch.setattr("app.serving.worker._TIMES", 0)
    with monkeypatch.context() as patch:
        real = engine._turns
        patch.setattr(engine, "_turns", lambda: (hung.wait(20), real())[1])
        waiting = threading.Thread(target=lambda: server.post(PATH, {"prompt": "a"}))
        waiting.start()
        until = time.monotonic() + 10
        while server.get("/health/ready").status_code == 200:
            assert time.monotonic() < until
        assert check_error_5(server.get("/health/ready")) == "not_ready"
        assert server.get("/health/live").status_code == 200
        hung.set()
        waiting.join()
    server.idle()
    assert server.get("/health/ready").status_code == 200


def check_error_5(response: httpx.Response) -> str:
    assert response.status_code == 503
    return str(response.json()["error"]["code"])


def test_nan_in_one_request_is_a_500_for_it_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.served["tiny"].engine.model
    real = model.embed.forward
    wanted = complete(server, prompt="good", max_tokens=9, seed=1)["choices"]

    def embed(input_ids: Any, where: Any) -> Any:
        x = real(input_ids, where)
        return x.masked_fill((input_ids == 255)[..., None], float("nan"))

    monkeypatch.setattr(model.embed, "forward", embed)
    found: list[Any] = []
    good = threading.Thread(
        target=lambda: found.append(complete(server, prompt="good", max_tokens=9, seed=1))
    )
    good.start()
    response = server.post(PATH, {"prompt": [1, 255], "max_tokens": 3})
    good.join()
    assert response.status_code == 500 and found[0]["choices"] == wanted


@pytest.mark.parametrize("running_ones", [0, 3])
def test_draining(running_ones: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D12：关门时在写的写完，新来的 503。"""
    with serving([tiny(rows=4)]) as running:
        slow(monkeypatch, 0.01)
        found: list[str] = []
        threads = [
            threading.Thread(
                target=lambda: found.append(running.post(PATH, {**LONG, "stream": True}).text)
            )
            for _ in range(running_ones)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while running.served["tiny"].engine.running < running_ones:
            assert time.monotonic() < until
        loop = running.service.hub._loop
        assert loop is not None
        done = asyncio.run_coroutine_threadsafe(running.service.drain(), loop)
        if running_ones:
            while not running.service.hub.closing:
                time.sleep(0.001)
            assert running.post(PATH, {"prompt": "a"}).status_code == 503
            assert running.get("/health/ready").status_code == 503
        done.result(20)
        for thread in threads:
            thread.join()
        assert all(text.endswith("data: [DONE]\n\n") for text in found)

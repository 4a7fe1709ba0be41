"""压测的客户端：一个 asyncio 的循环，自己写的最小 HTTP，省得客户端比服务还忙。

每个客户端一条保持的连接，流式地问；记下计划的与实际的发出时刻、每个词元到的时刻。
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """planned：该发出的时刻（开环里排队也算在等里）；marks：每片文字到的时刻。"""

    planned: float
    marks: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def first(self) -> float:
        return (self.marks[0] if self.marks else self.end) - self.planned

    @property
    def gaps(self) -> list[float]:
        """头一个词元不算：那是读提示。"""
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


class Connection:
    """一条保持的连接。"""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: dict[str, Any], planned: float) -> Answer:
        """流式地问一次。"""
        answer = Answer(planned)
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        data = json.dumps({**body, "stream": True}).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        status, chunked, closing = await self._head(reader)
        pending = ""
        while True:
            size = int((await reader.readline()).strip() or b"0", 16) if chunked else 0
            piece = (await reader.readexactly(size)).decode() if size else ""
            if chunked:
                await reader.readline()
            if not piece:
                break
            *lines, pending = (pending + piece).split("\n")
            for line in lines:
                self._note(answer, line)
        if status != 200:
            answer.error = f"status {status}" if status else "closed without an answer"
        answer.end = time.perf_counter()
        if closing or not chunked or not status:
            self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _head(self, reader: asyncio.StreamReader) -> tuple[int, bool, bool]:
        """(状态, 分块, 说完就断)。"""
        status, lines = int(((await reader.readline()).split() + [b"0", b"0"])[1]), set[bytes]()
        while (line := (await reader.readline()).strip()) != b"":
            lines.add(line.lower())
        return status, b"transfer-encoding: chunked" in lines, b"connection: close" in lines

    def _note(self, answer: Answer, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = str(event["error"])
            return
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice.get("text"):
                answer.text += choice["text"]
                answer.marks.append(time.perf_counter())


async def closed_loop(
    address: tuple[str, int], bodies: Sequence[dict[str, Any]], clients: int
) -> list[Answer]:
    """每个客户端得到回答才问下一个；bodies 分给大家。"""
    left, answers = list(bodies)[::-1], list[Answer]()

    async def one() -> None:
        connection = Connection(*address)
        while left:
            body = left.pop()
            answers.append(await connection.ask("/v1/completions", body, time.perf_counter()))
        connection.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return answers


async def open_loop(
    address: tuple[str, int], bodies: Sequence[dict[str, Any]], gaps: Sequence[float]
) -> list[Answer]:
    """按计划的时刻发出，不等前一个；等待从计划的时刻算起。"""
    start, at, asked = time.perf_counter(), 0.0, []

    async def one(body: dict[str, Any], planned: float) -> Answer:
        await asyncio.sleep(max(0.0, planned - time.perf_counter()))
        connection = Connection(*address)
        answer = await connection.ask("/v1/completions", body, planned)
        connection.close()
        return answer

    for body, gap in zip(bodies, gaps, strict=True):
        at += gap
        asked.append(asyncio.create_task(one(body, start + at)))
    return list(await asyncio.gather(*asked))


def quantile(values: Sequence[float], q: float) -> float:
    """第 q 个百分位；一个数也没有就是 NaN。"""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[min(98, round(q * 100) - 1)]

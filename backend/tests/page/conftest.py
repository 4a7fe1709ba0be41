"""页面的测试：一个服务、一个浏览器；每个测试一个空的上下文，用完必须干净。

干净：控制台没有错误，没有内容安全策略的报告，没有一个请求去别处。
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from app.data.tokenizers import ByteTokenizer
from app.serving.engine import Limits
from app.serving.served import Served, serve_model
from tests.serving.conftest import Running, serving
from tests.serving.helpers import byte_model

HOSTILE = "<img src=x onerror=window.hacked=1>"
_FLAGS = [
    "--no-sandbox", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
# 页面自己在报告：浏览器的控制台之外，也听事件。
_WATCH = """
window.reports = [];
addEventListener("securitypolicyviolation", (e) => window.reports.push(e.violatedDirective));
window.longest = 0;
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) window.longest = Math.max(window.longest, one.duration);
}).observe({ type: "longtask", buffered: true });
"""


def chromium() -> str:
    """浏览器在哪里；没有就带着说明跳过。"""
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is None:
        pytest.skip("chromium is absent: apt-get install chromium")
    return found


class Endless(ByteTokenizer):
    """从不停：随机的模型偶尔会写出分隔符，那样写几个就不由测试说了算。"""

    stop_ids = ()


def hostile() -> Served:
    """每个字母都是一段想当标记的文字；上下文很短。"""
    tokenizer = Endless()
    tokenizer._table = [
        HOSTILE.encode() if chr(i).isalpha() and i < 128 else data
        for i, data in enumerate(tokenizer._table)
    ]
    return serve_model("hostile", byte_model(context_size=48), tokenizer, rows=2, limits=Limits())


def mine(seed: int = 7) -> Served:
    torch.manual_seed(seed)
    return serve_model(
        "tiny", byte_model(context_size=320, n_layer=3), Endless(), rows=4, limits=Limits()
    )


@pytest.fixture(scope="session")
def page_server() -> Iterator[Running]:
    with serving([mine(), hostile()]) as running:
        yield running


@pytest.fixture
def server(page_server: Running) -> Iterator[Running]:
    """用完要回到没有事做：没有一行还被占着。"""
    yield page_server
    page_server.idle()


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """离开这个文件夹就关：它在主线程里留着一个事件循环，别的测试的 asyncio.run 容不下。"""
    where = chromium()
    driving = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driving.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=where, args=_FLAGS)
        yield opened
        opened.close()


@dataclass
class Visit:
    """一次来访。expected：这个测试故意惹出的控制台错误。"""

    page: Any
    url: str
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    expected: str | None = None

    def open(self, model: str = "tiny") -> Any:
        self.page.goto(self.url)
        self.page.locator("#continue:enabled").wait_for()
        if self.page.locator("#model").is_visible():
            self.page.select_option("#model", model)
        return self.page

    def write(self, text: str, count: int = 8) -> Any:
        """写 text，接着写 count 个，等到写完。"""
        page = self.page
        if page.locator("#draft").is_hidden():
            page.click("#edit")
        page.fill("#draft", text)
        page.fill("#count", str(count))
        page.keyboard.press("Control+Enter")
        self.done()
        return page

    def done(self) -> None:
        self.page.locator("#stop:disabled").wait_for()
        self.page.locator("#tokens .tok").first.wait_for()

    def ids(self) -> list[int]:
        """正文的词元号，从页面自己的状态里取。"""
        script = "async () => (await import('/assets/store.js')).branch().tokens.map((t) => t.id)"
        found: list[int] = self.page.evaluate(script)
        return found

    def look(self, view: str) -> Any:
        self.page.click(f"#tab-{view}")
        return self.page.locator(f"#view-{view}")

    def check(self) -> None:
        errors = [e for e in self.errors if not (self.expected and re.search(self.expected, e))]
        assert not errors and not self.elsewhere, (errors, self.elsewhere)
        assert self.page.evaluate("window.reports") == []
        assert self.page.evaluate("window.hacked") is None


def visiting(browser: Any, url: str, **options: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    context.set_default_timeout(10_000)
    context.add_init_script(_WATCH)
    visit = Visit(context.new_page(), url)

    def guard(route: Any) -> None:
        if route.request.url.startswith(url):
            route.fallback()
        else:
            visit.elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    visit.page.on("console", lambda m: m.type == "error" and visit.errors.append(m.text))
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    yield visit
    visit.check()
    context.close()


@pytest.fixture
def visit(browser: Any, server: Running) -> Iterator[Visit]:
    yield from visiting(browser, server.url)

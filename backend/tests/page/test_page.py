"""页面做的事：写、停、撤销、枝、键盘、语言、明暗、坏消息。"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from app.serving.api.app import Address
from tests.page.conftest import HOSTILE, Visit, mine, visiting
from tests.serving.conftest import Running, serving
from tests.serving.helpers import KEYS

VIEWS = ["branches", "sampling", "tokenizer", "attention", "lens", "training", "engine"]


def tokens(page: Any) -> list[str]:
    found: list[str] = page.locator("#tokens .tok").all_text_contents()
    return found


def held(server: Running) -> int:
    return sum(row["busy"] for row in server.get("/slots").json())


def wait_for(what: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_writing_undoing_and_branching(visit: Visit, server: Running) -> None:
    page = visit.open()
    sent: list[dict[str, Any]] = []
    page.on("request", lambda r: r.post_data and sent.append(json.loads(r.post_data)))
    visit.write("def f(", 12)
    first = tokens(page)
    assert "".join(first[:6]) == "def f(" and len(first) == 18
    assert page.locator("#tokens .made").count() == 12
    assert page.locator("#said").text_content().startswith("12 tokens written")
    page.click("#continue")
    visit.done()
    assert tokens(page)[:18] == first and len(tokens(page)) == 30

    # 别的可能：提示是前面的号加选的那个，前面的都是借来的。
    before = server.get("/metrics").text
    page.locator("#tokens .tok").nth(9).focus()
    page.keyboard.press("Enter")
    other = page.locator("#likely .one:not(.chosen)").first
    chosen = int(other.get_attribute("data-id"))
    other.focus()
    page.keyboard.press("Enter")
    page.locator("#tree .twig").nth(1).wait_for()
    visit.done()
    asked = [body for body in sent if "details" in body][-1]
    whole = [body for body in sent if "details" in body][0]["prompt"]
    assert asked["prompt"][:6] == whole and asked["prompt"][-1] == chosen
    assert len(asked["prompt"]) == 10 and not asked["echo"]
    hits = [
        _metric(text, "prefix_cache_hits_total") for text in (before, server.get("/metrics").text)
    ]
    assert hits[1] - hits[0] == 9
    branched = tokens(page)
    # 两个号不同，写出来却可以一样（半个字符）。
    assert branched[:9] == first[:9] and len(branched) == 22

    # 走回去，再走过来；撤销把枝也撤了。
    page.locator("#tree .twig").first.click()
    assert tokens(page)[:18] == first
    page.locator("#tree .twig").nth(1).click()
    assert tokens(page) == branched
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert page.locator("#tree .twig").count() == 1 and tokens(page)[:18] == first
    page.keyboard.press("Control+z")
    assert tokens(page) == first
    page.keyboard.press("Control+z")
    assert page.locator("#draft").input_value() == "def f("
    page.click("#redo")
    assert tokens(page) == first


def _metric(text: str, name: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(f"gpt2_{name}")
    )


def slow_down(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """每一步慢一点：来得及在半路做别的。"""
    engine = server.served["tiny"].engine
    step = engine.step

    def slowly() -> Any:
        time.sleep(0.03)
        return step()

    monkeypatch.setattr(engine, "step", slowly)


def in_the_middle(visit: Visit, server: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    """正写到一半的页面：占着一行，至少写了四个。"""
    slow_down(server, monkeypatch)
    page = visit.open()
    page.fill("#draft", "abc")
    page.fill("#count", "250")
    page.keyboard.press("Control+Enter")
    page.locator("#tokens .made").nth(3).wait_for()
    assert held(server) == 1
    return page


def test_stop_keeps_the_text_and_frees_the_row(
    visit: Visit, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = in_the_middle(visit, server, monkeypatch)
    page.keyboard.press("Escape")
    visit.done()
    wait_for(lambda: held(server) == 0)
    assert 4 <= page.locator("#tokens .made").count() < 250
    assert page.locator("#said").text_content() == "Stopped"
    page.click("#undo")
    assert page.locator("#draft").input_value() == "abc"


def test_reload_in_a_stream_frees_the_row(
    visit: Visit, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = in_the_middle(visit, server, monkeypatch)
    page.reload()
    wait_for(lambda: held(server) == 0)
    page.locator("#continue:enabled").wait_for()


def test_everything_with_the_keyboard(visit: Visit) -> None:
    """一次也不碰鼠标：走遍每个视图；每个停处都看得见焦点。"""
    page = visit.open()
    press = page.keyboard.press

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(40):
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
            press(key)
        raise AssertionError(f"Tab never comes to {selector}")

    page.locator("body").press("Tab")
    tab_to("#draft")
    page.keyboard.type("the cat the cat the")
    press("Control+Enter")
    visit.done()
    page.locator("#tokens .made").nth(31).wait_for()
    assert page.evaluate("document.activeElement.id") == "tokens"
    press("ArrowRight")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        press(key)
    assert "Token 3" in page.locator("#reading").text_content()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Token 3")
    assert page.locator("#tokens [tabindex='0']").count() == 1
    press("Enter")
    page.locator("#likely .one:focus").wait_for()
    press("ArrowRight")
    assert "Token 4" in page.locator("#about").text_content()
    if page.evaluate("document.activeElement.matches('.chosen')"):
        press("ArrowDown")
    press("Enter")
    page.locator("#tree .twig").nth(1).wait_for()
    visit.done()
    tab_to("#tree .twig")
    press("ArrowUp")
    press("Enter")
    page.locator("#tree .twig.current").first.wait_for()

    tab_to("[role=tab]", "Shift+Tab")
    inside = {
        "sampling": "#next .one", "tokenizer": "#pieces .piece", "attention": "#map",
        "lens": "#lens-table td", "training": ".run h3", "engine": "#rows .slot",
    }  # fmt: skip
    for view in VIEWS[1:]:
        press("ArrowRight")
        assert page.locator("[role=tab]:focus").get_attribute("id") == f"tab-{view}"
        assert page.locator("[role=tabpanel]:visible").count() == 1
        page.locator(f"#view-{view} {inside[view]}").first.wait_for()
        if view not in ("training", "engine"):
            tab_to(f"#view-{view} {inside[view]}")
            for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
                press(key)
            tab_to("[role=tab]", "Shift+Tab")
    press("?")
    page.locator("#help[open]").wait_for()
    press("Escape")
    assert not page.locator("#help[open]").count()
    press("Control+z")
    press("Control+z")
    wait_for(lambda: page.locator("#tree .twig").count() == 1)


def test_hostile_tokens_stay_text(visit: Visit) -> None:
    page = visit.open("hostile")
    visit.write("a1b", 4)
    assert tokens(page)[0] == HOSTILE
    page.locator("#tokens .tok").nth(2).click()
    for view in VIEWS:
        visit.look(view)
        if view not in ("training", "engine"):
            page.locator(f"#view-{view}", has_text="onerror").wait_for()
    assert page.locator("main img").count() == 0 and page.evaluate("window.hacked") is None


def test_the_server_goes_and_comes_back(browser: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving([mine()], port=port) as first:
        visits = visiting(browser, first.url)
        visit = next(visits)
        visit.expected = "ERR_CONNECTION_REFUSED|ERR_INCOMPLETE|ERR_EMPTY|net::ERR"
        page = visit.open()
        visit.write("abc", 4)
    page.click("#continue")
    page.locator("#problem", has_text="does not answer").wait_for()
    assert len(tokens(page)) == 7
    with serving([mine()], port=port):
        page.click("#retry")
        page.locator("#tokens .tok").nth(10).wait_for()
        visit.done()
        assert page.locator("#problem").count() == 0
    # 同名而不是同一个模型：说出来，再试就全部重新读。
    with serving([mine(8)], port=port) as third:
        page.click("#continue")
        page.locator("#problem", has_text="another model").wait_for()
        count = len(tokens(page))
        page.click("#retry")
        page.locator("#tokens .tok").nth(count).wait_for()
        visit.done()
        asked = {"prompt": visit.ids()[:count], "max_tokens": 0, "echo": True, "details": 0}
        (choice,) = third.post("/v1/completions", asked).json()["choices"]
        shown = page.locator("#tokens .tok").nth(count - 1).get_attribute("data-logprob")
        assert float(shown) == pytest.approx(choice["details"][-1]["logprob"], abs=1e-9)
        assert next(visits, None) is None


def test_bad_news_is_told(visit: Visit) -> None:
    """上下文满了、太长、不许看、没有检查点、页面是旧的。"""
    visit.expected = "status of (400|403|404)"
    page = visit.open("hostile")
    visit.write("1" * 45, 8)
    page.locator("#problem", has_text="fewer tokens than asked").wait_for()
    assert len(tokens(page)) == 48
    page.click("#continue")
    page.locator("#problem", has_text="context of 48 tokens is full").wait_for()
    page.click("#edit")
    page.fill("#draft", "1" * 49)
    page.click("#read")
    page.locator("#problem", has_text="has 49 tokens but the model's context is 48").wait_for()
    assert page.locator("#draft").input_value() == "1" * 49
    # 编码的时候打的字会不见：那时不许打。
    pending: list[Any] = []
    page.route("**/tokenize", lambda route: pending.append(route))
    page.click("#read")
    page.locator("#draft[readonly]").wait_for()
    pending[0].continue_()
    page.locator("#draft:not([readonly])").wait_for()
    page.unroute("**/tokenize")

    refusal = {"error": {"message": "off", "type": "x", "param": None, "code": "inspect_off"}}
    page.route("**/v1/inspect", lambda route: route.fulfill(status=403, json=refusal))
    visit.write("123", 2)
    for view in ("attention", "lens", "sampling"):
        visit.look(view).get_by_text("start it with --inspect").wait_for()
    visit.look("training").locator(".run .about").wait_for()
    page.unroute("**/v1/inspect")

    def older(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "page_version": "other"})

    page.route("**/props", older)
    page.reload()
    page.locator("#outdated").wait_for()
    page.locator("#lang").click()
    assert "另一个版本" in page.locator("#outdated").text_content()


def test_a_key_is_asked_for_and_kept_in_memory(browser: Any) -> None:
    with serving([mine()], replace(Address(), keys=KEYS[:1])) as running:
        for visit in visiting(browser, running.url):
            visit.expected = "status of 401"
            page = visit.page
            page.goto(running.url)
            page.fill("#key-field", KEYS[0])
            page.keyboard.press("Enter")
            page.locator("#continue:enabled").wait_for()
            visit.write("abc", 4)
            assert len(tokens(page)) == 7
            kept = page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]")
            assert kept == ["", 0, 0]


@pytest.mark.parametrize("width", [1280, 360])
def test_language_theme_and_width(visit: Visit, width: int) -> None:
    """两种语言、明暗、每个视图：不横着滚，没有漏译的一句。"""
    page = visit.open()
    page.set_viewport_size({"width": width, "height": 800})
    visit.write("the cat the cat", 24)
    page.locator("#tokens .tok").nth(5).click()
    seen = []
    for language, theme in (("en", "light"), ("zh-Hans", "dark")):
        page.select_option("#theme", theme)
        assert page.evaluate("document.documentElement.lang") == language
        for view in VIEWS:
            visit.look(view)
            root = page.evaluate(
                "[document.documentElement.scrollWidth, document.body.scrollWidth]"
            )
            assert max(root) <= width, (view, language, root)
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.locator("#continue").text_content() == {"en": "Continue"}.get(
            language, "接着写"
        )
        page.click("#lang")
    assert len(set(seen)) == 2


def test_a_long_text_never_blocks_the_page(visit: Visit) -> None:
    """256 个词元流进来，没有一个任务超过 50 毫秒（浏览器自己的 longtask）。

    别的程序只会使它变长，所以三次里有一次没有就算；真的挡住的页面三次都有。
    正文只在后面加：没有一个画过的词元被拿掉。
    """
    page = visit.open()
    visit.write("a", 4)
    page.evaluate(
        """() => { window.removed = 0; new MutationObserver((all) => all.forEach((one) => {
          window.removed += one.removedNodes.length; }))
          .observe(document.querySelector("#tokens"), { childList: true }); }"""
    )
    page.fill("#count", "256")
    longest = []
    for _ in range(3):
        page.evaluate("window.longest = 0")
        page.keyboard.press("Control+Enter")
        page.locator("#tokens .tok").nth(260).wait_for(timeout=60_000)
        visit.done()
        page.wait_for_timeout(100)
        longest.append(page.evaluate("window.longest"))
        assert page.evaluate("window.removed") == 0
        if longest[-1] == 0:
            return
        page.click("#undo")
        page.evaluate("window.removed = 0")
    raise AssertionError(f"every time a task over 50 ms: {longest}")

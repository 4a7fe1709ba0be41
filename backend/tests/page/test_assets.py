"""页面的文件：头、版本、缓存、不要钥匙、装好的包里也有。"""

from __future__ import annotations

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

from app.serving.api.app import Address
from app.serving.api.assets import FOLDER, Assets
from tests.serving.conftest import Running, serving, tiny
from tests.serving.helpers import KEYS

FILES = sorted(
    p.relative_to(FOLDER).as_posix()
    for p in FOLDER.rglob("*")
    if p.suffix != ".json" and p.is_file()
)


def test_headers_version_and_cache(server: Running) -> None:
    page = server.get("/")
    policy = page.headers["content-security-policy"]
    for part in (
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ):
        assert part in policy
    assert "unsafe" not in policy and page.headers["cache-control"] == "no-cache"
    version = re.search(r'name="version" content="([0-9a-f]{16})"', page.text)
    assert version and version[1] == server.get("/props").json()["page_version"]
    for name in FILES:
        answer = server.get("/" if name == "index.html" else f"/assets/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        tag = answer.headers["etag"]
        again = server.get(answer.request.url.path, headers={"if-none-match": tag})
        assert again.status_code == 304 and again.content == b""
        if name != "index.html":
            assert answer.content == (FOLDER / name).read_bytes()
    for name in ("../api/app.py", "%2e%2e/api/app.py", "jsconfig.json", "nothing.js"):
        assert server.get(f"/assets/{name}").status_code == 404


def test_a_changed_file_is_another_version(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "page")
    before = Assets(tmp_path / "page").version
    assert before == Assets().version
    with open(tmp_path / "page" / "style.css", "a") as file:
        file.write("\n")
    assert Assets(tmp_path / "page").version != before


def test_the_page_needs_no_key_and_the_host_rule_stays() -> None:
    with serving([tiny()], replace(Address(), keys=KEYS[:1])) as running:
        assert running.get("/").status_code == 200
        assert running.get("/assets/main.js").status_code == 200
        assert running.get("/props").status_code == 401
        assert running.get("/assetsx").status_code == 401
        assert running.get("/", headers={"host": "evil.example"}).status_code == 421


def test_the_files_are_in_the_package() -> None:
    """pyproject 的 package-data 说哪些文件会装上；每个都在里面，类型的配置不在。"""
    serving_room = FOLDER.parent
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["app.serving"]
    found = {path for pattern in patterns for path in serving_room.glob(pattern)}
    assert found == {FOLDER / name for name in FILES}


def test_the_page_is_small_and_plain() -> None:
    """读得完：每个文件不到 400 行，一共不到 150 kB；没有标记进 DOM 的路，没有别处的地址。"""
    sources = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    assert sum(len(text.encode()) for text in sources.values()) < 150_000
    for name, text in sources.items():
        assert len(text.splitlines()) < 400, name
        for bad in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "localStorage",
            "new Function",
        ):
            assert bad not in text, (name, bad)
        links = set(re.findall(r"https?://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
        assert not links, (name, links)


def test_every_word_is_in_both_languages() -> None:
    """用到的词都在词典里，词典里的都用得到，两种语言的 {…} 相同。"""
    words = (FOLDER / "words.js").read_text(encoding="utf-8")
    pairs = re.findall(
        r'^\s*"([\w.]+)": \[\s*("(?:[^"\\]|\\.)*"),\s*("(?:[^"\\]|\\.)*"),?\s*\]', words, re.M
    )
    pairs += re.findall(r'\], "([\w.]+)": \[("(?:[^"\\]|\\.)*"), ("(?:[^"\\]|\\.)*")\]', words)
    assert len({name for name, _, _ in pairs}) > 150
    for name, english, chinese in pairs:
        assert set(re.findall(r"\{(\w+)\}", english)) == set(re.findall(r"\{(\w+)\}", chinese)), (
            name
        )

"""docs/serving.md 里的命令真的能用。"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serving.conftest import Running

GUIDE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
HOME = "http://127.0.0.1:8080"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_of_the_guide(server: Running) -> None:
    commands = [line for line in GUIDE.splitlines() if line.startswith("curl ")]
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command.replace(HOME, server.url))[1:]
        whole = ["curl", "-sS", "--noproxy", "*", *words]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        if "-N" in command:
            assert done.stdout.endswith("data: [DONE]\n\n") and '"usage":{' in done.stdout
        else:
            assert "error" not in json.loads(done.stdout), done.stdout


def test_the_python_of_the_guide(server: Running) -> None:
    pytest.importorskip("openai")
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace(HOME, server.url), names)
    assert names["name"] == "tiny"


def test_every_metric_of_the_guide_is_there(server: Running) -> None:
    found = server.get("/metrics").text
    named = set(re.findall(r"`(gpt2_\w+)", GUIDE))
    assert len(named) == 18
    for name in named:
        assert f"# HELP {name.removesuffix('_total')}" in found or f"# HELP {name}" in found, name

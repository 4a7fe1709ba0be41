"""docs/look-inside.md 里的命令真的能用：小得多的数据与步数，次序照旧。"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from app.cli.commands import serve
from app.cli.commands import train as train_command
from app.cli.main import main
from tests.serving.conftest import serving
from tests.serving.inside import serve_run, unpack

GUIDE = (Path(__file__).parents[3] / "docs" / "look-inside.md").read_text(encoding="utf-8")
HOME = "http://127.0.0.1:8080"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOY = [
    "--steps",
    "4",
    "--schedule.warmup-steps",
    "0",
    "--keep-every",
    "2",
    "--eval-every",
    "0",
    "--save-every",
    "0",
]


def test_the_guide_from_the_data_to_the_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.training.run.plot_losses", lambda run: None)
    lines = []
    for kind, text in BLOCK.findall(GUIDE):
        if kind == "python":
            exec(text.replace("20_000", "200"), {})
        elif kind == "bash":
            lines += text.splitlines()
    asked = [shlex.split(line) for line in lines]
    for words in (words for words in asked if words[:1] == ["gpt2"]):
        if words[1] == "serve":
            assert serve.parse(words[2:]).inspect
        elif "quickstart" in words[-1] or "quickstart" in words:
            if words[1] == "train":
                assert train_command.parse(words[2:]).train.keep_every == 150
        else:
            toy = TOY if words[1] == "train" else []
            assert main([*words[1:], *toy]) == 0, words
    said = capsys.readouterr().out
    assert "step-00000002  induction" in said and "every head of step-00000004:" in said
    assert Path("heads.png").read_bytes().startswith(b"\x89PNG")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with serving([serve_run(Path("runs/induction").resolve())]) as running:
        answers = [
            ask(words[1:], running.url) for words in asked if words[:1] == ["curl"]
        ]  # fmt: skip
    assert len(answers) == 4
    first, second, held, reviewed = answers
    assert unpack(json.loads(first)["attention"]["weights"]).shape == (2, 4, 6, 6)
    assert {"patterns", "head_scores", "next_logits", "next"} <= set(json.loads(second))
    assert [one["step"] for one in json.loads(held)["checkpoints"]] == [2, 4]
    last = json.loads(reviewed.strip().split("data: ")[-1])
    assert last["steps"] == [2, 4] and not np.isnan(unpack(last["logprob"])[:, 1:]).any()


def ask(words: list[str], url: str) -> str:
    words = [word.replace(HOME, url) for word in words]
    whole = ["curl", "-sS", "--noproxy", "*", *words]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and '"error"' not in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_induction_head_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """配方的全部 800 步：第 200 步还没有，最后有一个头超过一半，那时第 0 层有看前一个词元的头。"""
    from app.cli.shared.head_scores import scored_checkpoints

    monkeypatch.chdir(tmp_path)
    (code,) = (text for kind, text in BLOCK.findall(GUIDE) if kind == "python")
    exec(code, {})
    for line in ("prepare repeats.txt --tokenizer chars --document-per-line --out data/repeats",
                 "train --config induction"):  # fmt: skip
        assert main(shlex.split(line)) == 0
    scores = scored_checkpoints("runs/induction", "cpu")
    early, late = scores["step-00000200"], scores["step-00000800"]
    assert early.induction.max() < 0.1 and late.induction.max() > 0.5
    assert late.induction[0].max() < 0.1 and late.previous[0].max() > 0.25

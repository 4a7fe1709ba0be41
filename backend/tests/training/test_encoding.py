"""控制台的编码写不出的字符，不结束任何训练：样文、提醒、报告、指标。"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from app.common import console
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.training.config import DataConfig, ScheduleConfig, TrainConfig
from app.training.saving.checkpoint import resolve_checkpoint

from .child import BACKEND, ENV
from .conftest import Make, rows

LETTERS = "漢字かなж🙂é"


@pytest.fixture
def config(make: Make, tmp_path: Path) -> TrainConfig:
    """每一段样文都满是 cp1252 与 ascii 写不出的字符；文件夹的名字也是。"""
    source, text = random.Random(0), tmp_path / "text.txt"
    text.write_text("".join(source.choice(LETTERS) for _ in range(4000)), encoding="utf-8")
    folder = tmp_path / "данные"
    prepare(Sources((text,)), folder, TokenizerSpec("chars"), say=lambda line: None)
    return make(
        data=DataConfig(folder=str(folder)), out=str(tmp_path / "训练"), sample_tokens=12,
        sample_every=2, sample_prompt="漢", eval_every=2, spike="warn",
        schedule=ScheduleConfig(warmup_steps=1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "encoding",
    [
        "ascii",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp1252", "cp437", "latin-1")),
    ],
)
def test_no_encoding_ends_a_run(config: TrainConfig, tmp_path: Path, encoding: str) -> None:
    code = (
        "import json, sys\n"
        "from app.training import run\n"
        "from app.training.config import TrainConfig\n"
        "config = TrainConfig.from_dict(json.loads(sys.argv[1]))\n"
        "run.train(config, lambda plan: None)\n"
        "run.train(config.replace(steps=9, resume='auto'), lambda plan: None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config.to_dict())],
        cwd=BACKEND, env=ENV | {"PYTHONIOENCODING": encoding}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"--- sample at step 9, temperature 0.8 ---" in done.stdout and b"\\u6f22" in done.stdout
    assert resolve_checkpoint(config.out).name == "step-00000009"
    samples = [row["text"] for row in rows(config.out, "sample")]
    assert len(samples) == 5 and all(text.startswith("漢") for text in samples)
    page = (Path(config.out) / "report.html").read_text(encoding="utf-8")
    assert samples[-1] in page


def test_what_can_be_written_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    for encoding, wanted in (("cp1252", "caf\xe9 \\u6f22"), ("utf-8", "caf\xe9 漢")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        console.say("caf\xe9 漢")
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == wanted + "\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.say("漢")
    assert sys.stdout.getvalue() == "漢\n"

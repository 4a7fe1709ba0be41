"""benchmarks.all：做完的、超时的、出错的、缺东西的各怎样说；每个模块都在。"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import all as benchmark

CODE = {
    "fine": "import os; open(os.environ['GPT2_RESULTS'] + '/fine.md', 'w').write("
    "'# fine\\n\\n```bash\\nx\\n```\\n\\n| a |\\n')",
    "slow": "import subprocess, sys; subprocess.run([sys.executable, '-c', "
    "'import time; time.sleep(600)'])",
    "bad": "raise SystemExit('it broke')",
    "silent": "",
}


def test_what_is_said_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(part: benchmark.Part, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", CODE[part.module]]

    limits = {"slow": 1.0}
    parts = [benchmark.Part(name, name, (), (), limits.get(name, 60.0)) for name in CODE]
    parts += [benchmark.Part("text", "fine", (), (), 60, "{text}")]
    parts += [benchmark.Part("peer", "fine", (), (), 60, "no_such_library")]
    monkeypatch.setattr(benchmark, "PARTS", tuple(parts))
    monkeypatch.setattr(benchmark, "command", command)
    assert benchmark.main(["--quick", "--out", str(tmp_path)]) == 1
    (written,) = tmp_path.glob("all-avx*.md")
    text = written.read_text("utf-8")
    for row in ("| fine | measured |", "| slow | failed |", "| bad | failed |",
                "| silent | failed |", "| text | skipped |", "| peer | skipped |",
                "not done in 1 s", "exit 1: it broke", "exit 0: nothing printed",
                "give --text", "no_such_library is not installed", "## fine\n\n| a |",
                "benchmarks.all --quick", "torch 2."):  # fmt: skip
        assert row in text, row
    assert "measured fine" in capsys.readouterr().out


def test_every_part_is_a_benchmark() -> None:
    for part in benchmark.PARTS:
        assert importlib.util.find_spec(f"benchmarks.{part.module}") is not None
    assert sum(part.seconds for part in benchmark.PARTS) <= 47 * 60
    assert [one.name for one in benchmark.chosen(["decode"])] == ["decode"]
    with pytest.raises(ValueError, match="only='decod' is not one of"):
        benchmark.chosen(["decod"])


def test_the_table_names_what_it_was_given() -> None:
    """照着表里的命令再跑，得到的是同样的几部分；自己机器上的地方不写进去。"""
    args = argparse.Namespace(quick=True, only=["decode"], text="/home/me/x", nanogpt="/home/me/n")
    line = '--quick --only "decode" --text tinyshakespeare.txt --nanogpt ../../nanoGPT'
    assert benchmark.shown(args) == line
    args = argparse.Namespace(quick=False, only=[], text="", nanogpt="")
    assert benchmark.shown(args) == ""

"""进度：别处是隔几秒一行，终端上一条活动的条；输出失败不毁掉活计。"""

from __future__ import annotations

import io
import sys

import pytest

from app.common import progress
from app.common.progress import Display, count_bytes
from app.common.units import duration, size
from app.training.report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    """读的一方已经走了。"""

    def __init__(self) -> None:
        super().__init__()
        self.tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise BrokenPipeError("Broken pipe")


def test_bytes_are_lines_away_from_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with count_bytes("tokenizing", 4_000_000) as advance:
        advance(1_000_000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with count_bytes("tokenizing", 4_000_000, done=1_000_000) as advance:
        advance(1_000_000)
        advance(2_000_000)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("tokenizing: 2.0 of 4.0 MB, ") and " MB/s, " in first
    assert last.startswith("tokenizing: 4.0 of 4.0 MB, ") and last.endswith(", 0 s left")


def test_the_lines_of_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    """十秒之内只有第一步的一行；验证的话总要说。"""
    show = Progress(steps=100, start=0, tokens_per_step=32)
    show.tell("before the display begins")
    with show:
        show.step(1, 2.5, 1e-3, 0.5)
        show.step(2, 2.4, 1e-3, 0.5)
        show.evaluated(2, 2.25, " (best so far)")
    assert capsys.readouterr().out.splitlines() == [
        "before the display begins",
        "step 1/100  loss 2.5000  lr 1.00e-03  64 tokens/s  50s left",
        "step 2/100  val 2.2500 (best so far)",
    ]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    show = Progress(steps=100, start=0, tokens_per_step=32)
    with show:
        show.step(1, 2.5, 1e-3, 0.5)
        show.tell("a [bold] word")
    assert "1/100  loss 2.5000" in screen.getvalue() and "a [bold] word\n" in screen.getvalue()


def test_nothing_is_shown_after_the_output_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Closed()
    monkeypatch.setattr(sys, "stdout", gone)
    with Display("step", 10) as display:
        display.tell("one")
        tried = gone.tried
        display.tell("two")
        display.show(1, lambda: "three")
    assert tried == 1 == gone.tried


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.4, 42, 185, 7620)] == ["0s", "42s", "3m05s", "2h07m"]
    assert [size(n) for n in (999, 3 << 29)] == ["999 bytes", "1.50 GiB"]

"""benchmarks.gpu 的逻辑：没有显卡也走得通，崩了、卡住了、时间到了各是一行，有没过的就是 1。"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import card, worker
from benchmarks.gpu.log import Log, Row, Skip
from benchmarks.gpu.parts import PARTS, Part, Place, chosen, lanes, run_part
from benchmarks.gpu.report import failures, markdown
from benchmarks.gpu.worker import Watch

CPU = torch.device("cpu")
# 要编译或要几秒的：slow 里都跑。
QUICK = ("decisions", "sdpa", "caches", "rope", "recompute", "memory", "ranks")


def rows_of(part: Part, seconds: float = 60) -> list[Row]:
    place = Place(CPU, "", time.monotonic() + seconds)
    return run_part(part, place, lambda row: None)


def passed(rows: list[Row]) -> bool:
    return bool(rows) and not failures(rows)


@pytest.mark.parametrize("name", QUICK)
def test_a_part_runs_at_toy_size(name: str) -> None:
    rows = rows_of(*chosen([name]))
    assert passed(rows), [row for row in rows if row.ok is False]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [part.name for part in PARTS if part.name not in QUICK])
def test_every_other_part_runs_too(name: str) -> None:
    rows = rows_of(*chosen([name]), 800)
    assert passed(rows), [row for row in rows if row.ok is False]


def part(run: object) -> Part:
    return Part("it", "check", 9, run)  # type: ignore[arg-type]


def test_an_error_is_its_row_and_a_nan_is_no_pass() -> None:
    def breaks(log: Log) -> None:
        log.holds("before", True, "1", "1")
        log.agrees("nan", torch.tensor([math.nan]), torch.ones(1), 1e-3)
        log.agrees("shape", torch.ones(2), torch.ones(1), 1e-3)
        log.agrees("off", torch.ones(1), torch.ones(1) * 1.01, 1e-3)
        raise RuntimeError("CUDA error: an illegal memory access\nlong story")

    rows = rows_of(part(breaks))
    assert [row.ok for row in rows] == [True, False, False, False, False]
    said = "RuntimeError: CUDA error: an illegal memory access (test_gpu_benchmark.py:"
    assert rows[-1].value.startswith(said)

    def refuses(log: Log) -> None:
        raise Skip("1 GPU here")

    (row,) = rows_of(part(refuses))
    assert (row.kind, row.ok, row.value) == ("skip", None, "1 GPU here")


WORKER = """
import json, sys, time
def send(**m): print("@gpu " + json.dumps(m), flush=True)
row = dict(kind="check", what="w", value="1", wanted="", ok=True)
for name in sys.argv[1:]:
    send(begin=name)
    if name == "dies":
        import os; os._exit(7)
    if name == "hangs": time.sleep(60)
    if name == "breaks":
        send(row={**row, "part": name, "ok": False}); send(end=name); sys.exit(70)
    print("a word of a library")
    send(row={**row, "part": name})
    send(end=name)
"""


def watched(names: Sequence[str], until: float = 60) -> tuple[list[Row], list[list[str]]]:
    asked: list[list[str]] = []

    def command(wanted: Sequence[str]) -> list[str]:
        asked.append(list(wanted))
        return [sys.executable, "-c", WORKER, *wanted]

    watch = Watch(command, lambda row: None)
    parts = [Part(name, "check", 0.1, lambda log: None) for name in names]
    watch.run(parts, time.monotonic() + until)
    return watch.rows, asked


def test_a_dead_and_a_hanging_process_cost_their_part_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "GRACE", 0.4)
    rows, asked = watched(["a", "dies", "b", "hangs", "c"])
    assert asked == [["a", "dies", "b", "hangs", "c"], ["b", "hangs", "c"], ["c"]]
    assert [(row.part, row.ok) for row in rows] == [
        ("a", True), ("dies", False), ("b", True), ("hangs", False), ("c", True),
    ]  # fmt: skip
    assert "ended with code 7" in rows[1].value and "past its limit" in rows[3].value
    assert "a word of a library" in capsys.readouterr().out


def test_a_broken_context_costs_its_part_alone() -> None:
    rows, asked = watched(["breaks", "b"])
    assert asked == [["breaks", "b"], ["b"]]
    assert [(row.part, row.ok) for row in rows] == [("breaks", False), ("b", True)]


def test_what_the_budget_leaves_no_time_for_is_said() -> None:
    rows, asked = watched(["a", "b"], until=-1)
    assert asked == [] and [row.kind for row in rows] == ["skip", "skip"]
    assert "budget" in rows[0].value


ROWS = [
    Row("sdpa", "check", "flash | causal", "3.0e-03", "error <= 2e-02", True),
    Row("flex", "check", "local(64)", "nan", "error <= 2e-05", False),
    Row("decode", "figure", "1 row", "900 tokens/s"),
    Row("ranks", "skip", "all of it", "1 GPUs here, 2 are needed"),
]


def test_the_table_and_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"date": "2026-01-01", "card": "NVIDIA H100 80GB HBM3", "torch": "2.13.0"}
    args = program.arguments(["--out", str(tmp_path)])
    assert program.finish(args, known, ROWS, 12.0) == 1
    text = (tmp_path / "gpu-nvidia-h100-80gb-hbm3.md").read_text()
    assert text.index("## Failed") < text.index("## Checks") < text.index("## Figures")
    assert "1 rows failed" in text and "flash \\| causal" in text
    found = json.loads((tmp_path / "gpu-nvidia-h100-80gb-hbm3.json").read_text())
    assert found["facts"] == known and len(found["rows"]) == 4
    assert capsys.readouterr().out.strip().endswith("FAIL flex: local(64): nan  (error <= 2e-05)")
    good = [row for row in ROWS if row.ok is not False]
    assert program.finish(args, known, good, 12.0) == 0
    assert "everything that ran passed" in markdown(known, good, "x", 1.0)


def test_without_a_gpu_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    args = program.arguments([])
    assert program.finish(args, {"date": "", "card": "no GPU"}, ROWS[:1], 1.0) == 0
    assert not list(tmp_path.iterdir()) and "nothing was written" in capsys.readouterr().out


def test_names_are_checked_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--only flexx is no part; the parts are decisions, "):
        program.main(["--only", "flexx"])
    assert program.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
    assert len({one.name for one in PARTS}) == len(PARTS)


def test_cards_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    card.peak_flops.cache_clear()
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12)):
        monkeypatch.setattr(card, "card_name", lambda device, name=name: name)
        card.peak_flops.cache_clear()
        assert card.peak_flops(CPU)[0] == peak
    monkeypatch.setattr(card, "card_name", lambda device: "Some Card")
    card.peak_flops.cache_clear()
    found, why = card.peak_flops(CPU)
    assert found > 0 and "large product here" in why
    card.peak_flops.cache_clear()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """真的起子进程；没有显卡时说明白。"""
    code = program.main(
        ["--device", "cpu", "--only", "rope", "memory", "--out", str(tmp_path), "--budget", "200"]
    )
    out = capsys.readouterr().out
    assert code == 0 and "there is no GPU here" in out
    assert (tmp_path / "gpu-no-gpu.md").exists()


def test_checks_side_by_side_are_all_of_them_and_keep_their_order() -> None:
    checks = [part for part in PARTS if part.kind == "check"]
    for jobs in (1, 3, 6):
        shares = lanes(checks, jobs)
        assert sorted(p.name for share in shares for p in share) == sorted(p.name for p in checks)
        assert len(shares) == jobs and all(share for share in shares)
        for share in shares:
            assert share == [part for part in checks if part in share]
        most = max(sum(part.seconds for part in share) for share in shares)
        longest = max(part.seconds for part in checks)
        assert most <= sum(part.seconds for part in checks) / jobs + longest


def test_rows_come_in_the_order_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """并排的核对先后不定，表却总是同一个次序；量的最后独占着跑。"""
    ran: list[list[str]] = []

    def run(self: Watch, parts: Sequence[Part], until: float) -> None:
        ran.append([part.name for part in parts])
        self.rows += [Row(part.name, part.kind, "x", "1") for part in parts]

    monkeypatch.setattr(Watch, "run", run)
    rows = program.everything(PARTS, Place(CPU, "", 0.0), 3)
    assert [row.part for row in rows] == [part.name for part in PARTS]
    assert ran[-1] == [part.name for part in PARTS if part.kind == "figure"]

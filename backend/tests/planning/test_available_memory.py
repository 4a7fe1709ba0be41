"""可用内存：读得到的照读，容器的限额更小时听它的，读不到的说不知道。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.common import memory
from app.planning import available_memory as room

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """一台假的机器：8 GiB 可用，没有容器。"""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(
        room, "_GROUPS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),)
    )
    return tmp_path


def test_the_available_memory_of_linux(machine: Path) -> None:
    assert room.available_memory(CPU) == (8 << 30, "MemAvailable")


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        (str(2 << 30), (2 << 30) - (1 << 30) + (1 << 29)),
        (str(1 << 20), 0),
        (str(1 << 60), 8 << 30),
        ("max", 8 << 30),
    ],
)
def test_a_container(machine: Path, limit: str, wanted: int) -> None:
    (machine / "memory.max").write_text(limit + "\n")
    (machine / "memory.current").write_text(f"{1 << 30}\n")
    (machine / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 29}\n")
    assert room.available_memory(CPU)[0] == wanted


def test_unknown_is_said(machine: Path) -> None:
    (machine / "meminfo").write_text("MemTotal: 16777216 kB\n")
    found, why = room.available_memory(CPU)
    assert found is None and "no MemAvailable" in why
    (machine / "meminfo").unlink()
    found, why = room.available_memory(CPU)
    assert found is None and "not known on this system" in why
    found, why = room.available_memory(torch.device("mps"))
    assert (found, why) == (None, "not known on mps")


def test_this_process(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "status").write_text("Name: python\nVmHWM: 300 kB\nVmRSS: 200 kB\n")
    monkeypatch.setattr(memory, "STATUS", machine / "status")
    assert memory.resident_memory() == 200 * 1024
    (machine / "status").unlink()
    assert memory.resident_memory() is None

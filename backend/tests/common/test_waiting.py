"""等活的线程睡还是转：谁说了算，说了什么。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.common import waiting


@pytest.mark.parametrize(
    ("wanted", "serving", "load", "policy"),
    [
        ("auto", True, 0.0, "passive"),
        ("auto", False, 0.0, "active"),
        ("auto", False, 99.0, "passive"),
        ("active", True, 0.0, "active"),
        ("passive", False, 0.0, "passive"),
    ],
)
def test_the_choice(
    wanted: waiting.Waiting,
    serving: bool,
    load: float,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    assert waiting.choose_waiting(wanted, serving)[0] == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert waiting.choose_waiting(wanted, serving) == ("active", "OMP_WAIT_POLICY is set")


def test_it_is_set_before_torch_and_said() -> None:
    code = (
        "import os; from app.common.waiting import settle_waiting\n"
        "settle_waiting('passive', False); print(os.environ['OMP_WAIT_POLICY'])\n"
        "import torch; settle_waiting('active', False); print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2], env={},
    )  # fmt: skip
    assert done.stdout == "PASSIVE\nPASSIVE\n"
    assert "idle threads: passive (asked for)" in done.stderr and "no effect" in done.stderr

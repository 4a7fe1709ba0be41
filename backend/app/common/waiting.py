"""等活的线程空转还是睡：OpenMP 的设定，要在导入 torch 之前定下。不依赖 torch。

空转的线程一有活就接上；可是别的程序也要核的时候，它占着核不让，大家一起慢。数与表见
docs/decisions/022-serving.md，这台机器上的由 benchmarks/waiting.py 量。
"""

from __future__ import annotations

import os
import sys
from typing import Literal

from app.common.tell import to_stderr

Waiting = Literal["auto", "active", "passive"]

_VARIABLE = "OMP_WAIT_POLICY"
# 一分钟的平均负载超过核数的这么多，就算有别人在用。
_BUSY = 0.25


def choose_waiting(wanted: Waiting, serving: bool) -> tuple[str, str]:
    """("active" 或 "passive", 理由)。

    serving: 除了算的线程，还有 HTTP 的循环与问的人要用核。
    """
    if _VARIABLE in os.environ:
        return os.environ[_VARIABLE].lower(), f"{_VARIABLE} is set"
    if wanted != "auto":
        return wanted, "asked for"
    if serving:
        return "passive", "clients and the HTTP loop need the cores too"
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY * cores:
        return "passive", f"other programs are busy (load {load:.1f} on {cores} cores)"
    return "active", f"the machine is idle (load {load:.1f} on {cores} cores)"


def settle_waiting(wanted: Waiting, serving: bool) -> None:
    """定下并说出来；torch 已经导入（程序里调用命令的人）就不再能定，也说出来。"""
    policy, why = choose_waiting(wanted, serving)
    if "torch" in sys.modules:
        if wanted != "auto":
            to_stderr(f"note: --waiting {wanted} has no effect: torch is already running")
        return
    if policy == "passive":
        # active 不必设：OpenMP 自己就先空转一阵再睡；明说 ACTIVE 则永不睡。
        os.environ[_VARIABLE] = "PASSIVE"
    to_stderr(f"idle threads: {policy} ({why}); --waiting chooses")

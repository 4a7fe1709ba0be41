"""这个进程至今占过的最多的内存。"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> dict[str, int]:
    """{"resident": 字节, "device": 字节}；量不到的不在其中。"""
    peak = {}
    resident = _resident_peak()
    if resident is not None:
        peak["resident"] = resident
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def _resident_peak() -> int | None:
    if _STATUS.is_file():
        # 不用 ru_maxrss：Linux 上它从父进程的值起算。
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024

"""内存：这个进程占着的、占过的最多的，系统还有的。都由 /proc 的一种写法读出。"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def kilobytes(path: Path, name: str) -> int | None:
    """/proc 里 `Name:  123 kB` 那一行，换成字节；没有这个文件或这一行则 None。"""
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def resident_memory() -> int | None:
    """这个进程此刻占的字节数；None = 这个系统不说。"""
    return kilobytes(STATUS, "VmRSS")


def resident_peak() -> int | None:
    """占过的最多的。"""
    # 不用 ru_maxrss：Linux 上它从父进程的值起算。
    peak = kilobytes(STATUS, "VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def peak_memory(device: torch.device) -> dict[str, int]:
    """{"resident": 字节, "device": 字节}；量不到的不在其中。"""
    peak = {}
    resident = resident_peak()
    if resident is not None:
        peak["resident"] = resident
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak

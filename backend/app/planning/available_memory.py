"""还有多少内存可用：能分配而不换页、不被系统杀掉的字节数。"""

from __future__ import annotations

from pathlib import Path

import torch

from app.common.memory import kilobytes

_MEMINFO = Path("/proc/meminfo")
# 容器的限额，cgroup v2 与 v1：(文件夹, 上限, 已用, 可收回的文件缓存在 memory.stat 里的名字)。
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_memory(device: torch.device) -> tuple[int | None, str]:
    """(字节数, 从哪里知道的)；不知道就是 None，并说明。"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "free on the GPU"
    if device.type != "cpu":
        return None, f"not known on {device.type}"
    if not _MEMINFO.is_file():
        return None, "not known on this system: no /proc/meminfo"
    free = kilobytes(_MEMINFO, "MemAvailable")
    if free is None:
        return None, "not known on this system: /proc/meminfo has no MemAvailable"
    limit = _container_room()
    if limit is not None and limit < free:
        return limit, "left under the container's limit"
    return free, "MemAvailable"


def _container_room() -> int | None:
    """没有限额（"max"）就是 None。"""
    for folder, limit, used, cached in _GROUPS:
        if not (folder / limit).is_file() or not (folder / used).is_file():
            continue
        text = (folder / limit).read_text().strip()
        if text.isdigit():
            reclaimable = _entry(folder / "memory.stat", cached)
            return max(0, int(text) - int((folder / used).read_text()) + reclaimable)
    return None


def _entry(path: Path, name: str) -> int:
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)

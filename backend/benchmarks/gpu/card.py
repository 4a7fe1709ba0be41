"""这张卡：名字、驱动、版本、bfloat16 的峰值与读内存的带宽。"""

from __future__ import annotations

import datetime
import importlib.util
import platform
import re
import subprocess
from functools import cache

import torch

from .log import seconds

# 稠密 bfloat16 的峰值，每秒浮点运算，取自各家的规格表；名字里先出现的先算。
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX A6000": 155e12,
}  # fmt: skip


def card_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "no GPU"


def file_name(card: str) -> str:
    """gpu-nvidia-h100-80gb-hbm3。"""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def facts(device: torch.device) -> dict[str, str]:
    found = {
        "date": datetime.date.today().isoformat(),
        "card": card_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in ("triton", "transformers"):
        found[name] = _version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": str(torch.version.cuda),
            "driver": _driver(),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cards": str(torch.cuda.device_count()),
        }
    return found


@cache
def peak_flops(device: torch.device) -> tuple[float, str]:
    """(每秒浮点运算, 怎样知道的)：认得的卡按规格，不认得的量一次大乘法。"""
    name = card_name(device)
    for known, flops in PEAKS.items():
        if known.lower() in name.lower():
            return flops, f"the {flops / 1e12:.0f} TFLOPS of the data sheet"
    found = matmul_flops(device)
    return found, f"the {found / 1e12:.3g} TFLOPS of a large product here"


def matmul_flops(device: torch.device) -> float:
    """bfloat16（CPU 上 float32）的大乘法。"""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(device, lambda: a @ b, 10)


def read_bandwidth(device: torch.device) -> float:
    """顺序读的带宽，字节/秒：逐词元解码的下限是权重的字节数除以它。"""
    numbers = 2**28 if device.type == "cuda" else 2**20
    x = torch.ones(numbers, device=device)
    return 4 * numbers / seconds(device, x.sum, 10)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().split("\n")[0] or "unknown"

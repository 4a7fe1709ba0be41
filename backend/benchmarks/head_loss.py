"""分块的头与交叉熵，与整张 logits 的写法比：时间与额外的峰值内存（4x1024 词元、50,304 词）。

cd backend && python -m benchmarks.head_loss
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from app.models.transformer.layers.loss import head_cross_entropy

from .common import table, write_result

ROWS, LENGTH, VOCAB, WIDTH = 4, 1024, 50304, 768


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())


WAYS = {"whole logits": naive, "chunked": head_cross_entropy}


def measure(way: str) -> None:
    """在自己的进程里跑一次：峰值内存只涨不落。"""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    # 就地缩放：多一份临时的 (V, C) 会抬高起点，把额外的峰值藏起来。
    weight = torch.randn(VOCAB, WIDTH).mul_(0.02).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS, LENGTH))
    (torch.randn(256, WIDTH, requires_grad=True) @ torch.randn(WIDTH, 64)).sum().backward()
    before, start = peak_mb(), time.perf_counter()
    loss = WAYS[way](hidden, weight, targets)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    print(
        time.perf_counter() - start, peak_mb() - before, loss.item(),
        hidden.grad.norm().item(), weight.grad.norm().item(),
    )  # fmt: skip


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(3):
        for way, results in runs.items():
            command = [sys.executable, "-m", "benchmarks.head_loss", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append([float(x) for x in done.stdout.split()])
    rows = []
    for way, results in runs.items():
        seconds, extra, *values = sorted(results)[1]
        rows.append([way, f"{seconds:.1f}", f"{extra:.0f}", *(f"{v:.6f}" for v in values)])
    norms = ["norm of grad hidden", "norm of grad weight"]
    header = ["way", "seconds", "extra peak MB", "loss", *norms]
    note = "\n\nForward and backward; the extra peak includes the 155 MB gradient of the weight."
    write_result(
        "head_loss", "cd backend && python -m benchmarks.head_loss", table(header, rows) + note
    )


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()

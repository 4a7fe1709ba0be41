"""基准共用：交替计时取中位数；把结果连同日期与硬件写进 results/。

机器上的计时有噪声：两件事要比，就在同一个进程里轮流跑，报比值。
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# benchmarks.all 让各基准把自己的表写到别处，由它合成一张。
RESULTS = Path(os.environ.get("GPT2_RESULTS", Path(__file__).parent / "results"))


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """每轮依次跑每一件，第一轮只作热身；返回各自用时的中位数（秒）。"""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def hardware() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return (
        f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}"
    )


def read_bandwidth() -> float:
    """顺序读内存的带宽，字节/秒：逐词元解码的下限就是权重字节数除以它。"""
    x = torch.ones(64 * 2**20)
    return x.numel() * 4 / interleaved({"sum": x.sum}, 5)["sum"]


def write_result(name: str, command: str, body: str) -> None:
    """覆盖 results/NAME.md；旧数字在 git 历史里。"""
    date = datetime.date.today().isoformat()
    text = f"# {name}\n\n{date}, {hardware()}\n\n```bash\n{command}\n```\n\n{body.strip()}\n"
    path = RESULTS / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    print(text)


def table(header: list[str], rows: list[list[object]]) -> str:
    lines: list[Sequence[object]] = [header, ["---"] * len(header), *rows]
    # 图样的文本里有竖线。
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)

"""等活的线程空转还是睡：解码的速度，机器闲着与有一个别的程序在忙。

cd backend && python -m benchmarks.waiting
设定要在导入 torch 之前，所以每一格是一个新的进程。
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .common import table, write_result

# 默认：转一阵再睡。
SETTINGS: dict[str, dict[str, str]] = {
    "active (OpenMP's default)": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
}
_CHILD = """
import sys, torch
from app.generation.speed import decode_speed
from app.models.transformer import create_gpt2_small
torch.set_num_threads(int(sys.argv[1]))
model = create_gpt2_small(vocab_size=50257, norm="pre", n_layer=int(sys.argv[2])).eval()
print(decode_speed([model], int(sys.argv[3]))[0])
"""
_BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: list[list[object]] = []
    for neighbours in (0, 1):
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(args.rounds):
            for name, setting in SETTINGS.items():
                with others(neighbours):
                    found[name].append(speed(args, setting))
        for name, values in found.items():
            spread = f"{min(values):.1f}..{max(values):.1f}"
            rows.append([neighbours, name, f"{statistics.median(values):.1f}", spread])
    header = ["busy neighbours", "idle threads", "tokens/s", "range"]
    write_result("waiting", "cd backend && python -m benchmarks.waiting", table(header, rows))


@contextmanager
def others(count: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def speed(args: argparse.Namespace, setting: dict[str, str]) -> float:
    words = [str(args.threads), str(args.layers), str(args.rounds)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP_SPIN"))}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *words], env={**clean, **setting}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout)


if __name__ == "__main__":
    main()

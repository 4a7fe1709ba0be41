"""有显卡的那一天：先核对，再量，写一张表；没有显卡时在 CPU 上以玩具的尺寸走同样的逻辑。

cd backend && python -m benchmarks.gpu
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..common import RESULTS
from .card import facts
from .log import Row
from .parts import PARTS, Part, Place, chosen, lanes
from .report import failures, line, write
from .worker import Watch, command, default_device, work

BUDGET = 460.0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="check what runs on a GPU against the CPU, then measure it; one table",
    )
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts alone")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of it")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)), metavar="N",
        help="checks run in N processes at once (default: half the cores, at most 6); "
        "what is measured runs alone afterwards",
    )  # fmt: skip
    parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT to be measured beside")
    parser.add_argument("--out", type=Path, help="folder of the table; on a GPU benchmarks/results")
    parser.add_argument("--device", default="", help="default: cuda if there is one, else cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    if args.list:
        for part in PARTS:
            print(f"{part.name:14} {part.about:9} at most {part.seconds:.0f} s")
        return 0
    start = time.monotonic()
    device = torch.device(args.device) if args.device else default_device()
    place = Place(device, args.nanogpt, start + args.budget)
    parts = chosen(args.only)
    if args.worker:
        return work(args.only, place)
    known = facts(device)
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    if device.type == "cpu":
        print(
            "there is no GPU here (device=cpu): the same logic runs at toy size; its figures mean "
            "nothing"
        )
    rows = everything(parts, place, max(1, args.jobs))
    return finish(args, known, rows, time.monotonic() - start)


def everything(parts: Sequence[Part], place: Place, jobs: int) -> list[Row]:
    """核对分几个进程一起走（编译占的是 CPU），之后独占着量；各行按部分的次序。"""
    checks = [part for part in parts if part.kind == "check"]
    figures = [part for part in parts if part.kind == "figure"]
    rows: list[Row] = []

    def run(some: Sequence[Part]) -> None:
        watch = Watch(command(place), lambda row: print(line(row) + "\n", end="", flush=True))
        watch.run(some, place.until)
        rows.extend(watch.rows)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, lanes(checks, jobs)))
    run(figures)
    order = [part.name for part in PARTS]
    return sorted(rows, key=lambda row: order.index(row.part))


def finish(args: argparse.Namespace, known: dict[str, str], rows: list[Row], took: float) -> int:
    """写表，最后说没有过的；有就是 1。"""
    out = args.out or (RESULTS if known["card"] != "no GPU" else None)
    print()
    if out is None:
        print("nothing was written (give --out FOLDER)")
    else:
        shown = "cd backend && python -m benchmarks.gpu " + " ".join(sys.argv[1:])
        for path in write(out, known, rows, shown.strip(), took):
            print(f"wrote {path}")
    bad = failures(rows)
    skipped = sum(row.kind == "skip" for row in rows)
    print(f"{len(rows)} rows in {took:.0f} s, {skipped} left out, {len(bad)} failed")
    for row in bad:
        print(line(row))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

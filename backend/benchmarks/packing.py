"""几种装法各要几行、占满几成、切断几例：假想的几种长度分布，数目与机器无关。

    python -m benchmarks.packing [--examples 20000] [--context 1024]

beside：每来一例放进当前行，放不下就另起一行（流式的贪心）；first-fit：放进最早放得下的一行；
concat：首尾相接再切（全满，但切断例子，而且要补边界的掩码）；padded：一例一行。
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from app.data.feeding.plan import best_fit

from .common import table, write_result

MANY = 1_000_000
Lengths = Callable[[np.random.Generator, int, int], np.ndarray]


def lognormal(median: float, sigma: float) -> Lengths:
    def draw(rng: np.random.Generator, n: int, context: int) -> np.ndarray:
        lengths = rng.lognormal(np.log(median * context), sigma, n)
        return np.clip(lengths, 1, context).astype(np.int64)

    return draw


def uniform(rng: np.random.Generator, n: int, context: int) -> np.ndarray:
    return rng.integers(1, context + 1, n)


def halves(rng: np.random.Generator, n: int, context: int) -> np.ndarray:
    """略多于一半的居多：哪种装法都难。"""
    low, high = rng.integers(1, context // 3, n), rng.integers(context // 2, 3 * context // 5, n)
    return np.where(rng.random(n) < 0.7, high, low)


DISTRIBUTIONS: dict[str, Lengths] = {
    "chat, median 1/5": lognormal(0.2, 0.8),
    "short answers, median 1/20": lognormal(0.05, 0.7),
    "long, median 1/2": lognormal(0.5, 0.6),
    "uniform": uniform,
    "just over half": halves,
}


def beside(lengths: np.ndarray, context: int) -> int:
    rows, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, context
        room -= length
    return rows


def first_fit(lengths: np.ndarray, context: int) -> int:
    """放不下最短一例的行不再看：结果相同，快得多。"""
    shortest, rooms, closed = int(lengths.min()), list[int](), 0
    for length in lengths.tolist():
        for i, room in enumerate(rooms):
            if room >= length:
                rooms[i] -= length
                if rooms[i] < shortest:
                    del rooms[i]
                    closed += 1
                break
        else:
            rooms.append(context - length)
    return len(rooms) + closed


def row(name: str, lengths: np.ndarray, context: int) -> list[object]:
    best = int(best_fit(-np.sort(-lengths), context).max()) + 1
    rows = [best, first_fit(lengths, context), beside(lengths, context), len(lengths)]
    ends = np.cumsum(lengths)
    cut = ((ends - 1) // context != (ends - lengths) // context).mean()
    shares = [f"{lengths.sum() / (r * context):.1%}" for r in rows]
    return [name, *shares, f"{len(lengths) / best:.2f}", f"{cut:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=1024)
    given = parser.parse_args()
    rows = [
        row(name, draw(np.random.default_rng(0), given.examples, given.context), given.context)
        for name, draw in DISTRIBUTIONS.items()
    ]
    header = [
        "lengths", "best fit decreasing", "first fit", "in order", "padded",
        "padded rows / best fit", "examples cut by joining",
    ]  # fmt: skip
    many = lognormal(0.2, 0.8)(np.random.default_rng(0), MANY, given.context)
    start = time.perf_counter()
    best_fit(-np.sort(-many), given.context)
    print(f"planning {MANY:,} examples: {time.perf_counter() - start:.1f} s")
    body = (
        f"{given.examples:,} examples, context {given.context}: share of the places that hold "
        f"tokens. Counts, the same on every machine.\n\n{table(header, rows)}"
    )
    write_result("packing", "cd backend && python -m benchmarks.packing", body)


if __name__ == "__main__":
    main()

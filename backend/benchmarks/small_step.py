"""小模型的一步（quickstart 与 shakespeare-char 两个配方）：精度与编译各换一次，`gpt2 train` 实跑。

cd backend && python -m benchmarks.small_step
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .common import table, write_result

RECIPES = Path(__file__).parents[2] / "recipes"
WAYS = [("float32", "off"), ("bfloat16", "off"), ("float32", "on")]
STEPS = 60


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    header = ["recipe", "precision", "compile", "ms a step", "seconds before the first step"]
    note = (
        f"\n\nMedian of {STEPS} steps of `gpt2 train` on random letters, the ways one after the "
        "other, twice; the first ten steps left out. The time before the first step is the whole "
        "run less its steps: it holds the start of Python and, with compile on, the compiler."
    )
    command = "cd backend && python -m benchmarks.small_step"
    write_result("small_step", command, table(header, rows) + note)


def measure(folder: Path) -> list[list[object]]:
    import random

    letters = random.Random(0).choices("abcdefgh ", k=200_000)
    (folder / "text.txt").write_text("".join(letters))
    gpt2, data = [sys.executable, "-m", "app.cli"], str(folder / "data")
    prepare = [*gpt2, "prepare", str(folder / "text.txt"), "--tokenizer", "chars", "--out", data]
    subprocess.run(prepare, check=True, capture_output=True)
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for turn in range(2):
        for recipe in ("quickstart", "shakespeare-char"):
            for precision, compiled in WAYS:
                out = folder / f"{recipe}-{precision}-{compiled}-{turn}"
                start = time.perf_counter()
                subprocess.run(
                    [*gpt2, "train", "--config", RECIPES / f"{recipe}.yaml", "--data.folder", data]
                    + ["--out", out, "--precision", precision, "--compile", compiled]
                    + ["--steps", str(STEPS), "--schedule.warmup-steps", "5", "--eval-every", "0"]
                    + ["--save-every", "0", "--sample-tokens", "0"],
                    check=True,
                    capture_output=True,
                )
                wall = time.perf_counter() - start
                lines = (out / "metrics.jsonl").read_text().splitlines()
                steps = [row["seconds"] for row in map(json.loads, lines) if row["kind"] == "train"]
                key = (recipe, precision, compiled)
                found.setdefault(key, []).append((statistics.median(steps[10:]), wall - sum(steps)))
    return [
        [
            *key,
            *(
                f"{min(x) * scale:.1f}"
                for x, scale in zip(zip(*runs, strict=True), (1e3, 1), strict=True)
            ),
        ]
        for key, runs in found.items()
    ]


if __name__ == "__main__":
    main()

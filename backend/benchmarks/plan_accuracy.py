"""`gpt2 plan --probe` 说的与 `gpt2 train` 真用的：一步的时间与内存的峰值，三种配置。

在 backend/ 里跑（数据由 `gpt2 prepare` 备好，词表不大于 4096）：

    python -m benchmarks.plan_accuracy --data ../data/stdlib
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from app.cli.shared.runfile import load_config
from app.models.transformer import GPT2Config
from app.planning.fit import probe_rows, training_footprint
from app.planning.probe import probe
from app.planning.sizes import parameters_by_part
from app.planning.tuned import ALONE
from app.training.config import DataConfig, ScheduleConfig, TrainConfig
from app.training.machine.runtime import choose_runtime
from benchmarks.common import table, write_result

SKIPPED = 3


def configurations(data: str) -> dict[str, TrainConfig]:
    quick = load_config("quickstart").config
    quiet: dict[str, Any] = {
        "data": DataConfig(folder=data), "eval_every": 0, "save_every": 0, "sample_tokens": 0,
        "eval_batches": 1, "schedule": ScheduleConfig(warmup_steps=1),
    }  # fmt: skip
    shape = {"vocab_size": 4096, "dropout": 0.0, "norm": "pre"}
    middle = GPT2Config(n_layer=4, n_head=4, n_embed=256, context_size=256, **shape)
    small = GPT2Config(n_layer=12, n_head=12, n_embed=768, context_size=256, **shape)
    small = small.replace(vocab_size=50304)
    return {
        "quickstart: 2 layers x 192, 8 x 128 tokens": dataclasses.replace(
            quick, **quiet, steps=60, model=quick.model.replace(vocab_size=4096)
        ),
        "4 layers x 256, 16 x 256 tokens in two passes": TrainConfig(
            **quiet, model=middle, batch_size=16, micro_batch=8, steps=24
        ),
        "GPT-2 small, 1 x 256 tokens": TrainConfig(**quiet, model=small, batch_size=1, steps=16),
    }


def planned(config: TrainConfig) -> tuple[float, int, int]:
    """(秒每步, 试跑得出的峰值, 只由配置推算的峰值)；字节数都含程序本身。"""
    runtime = choose_runtime(config)
    parameters = sum(parameters_by_part(config.model).values())
    found = probe(config, parameters, rows=probe_rows(config, runtime), limit=150)
    assert found.peak is not None and found.base is not None
    guess = training_footprint(config, runtime, ALONE)
    return found.seconds, found.peak + found.base, guess.peak + found.base


def trained(config: TrainConfig) -> tuple[float, int]:
    """真的训练：(一步的中位数, 进程的峰值)；峰值在最后一步之后、验证时记下。"""
    with tempfile.TemporaryDirectory() as folder:
        run, path = Path(folder) / "run", Path(folder) / "run.yaml"
        path.write_text(json.dumps(config.replace(out=str(run)).to_dict()))
        subprocess.run(
            [sys.executable, "-m", "app.cli", "train", "--config", str(path)],
            check=True, stdout=subprocess.DEVNULL, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )  # fmt: skip
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row["kind"] == "train"][SKIPPED:]
    return statistics.median(seconds), max(r["resident"] for r in rows if r["kind"] == "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../data/stdlib")
    parser.add_argument("--rounds", type=int, default=2, help="plan and training take turns")
    parser.add_argument("--only", type=int, choices=(0, 1, 2))
    parser.add_argument("--rows", type=Path, help="keep the rows measured so far in this file")
    arguments = parser.parse_args()
    data, kept = str(Path(arguments.data).resolve()), arguments.rows
    rows = json.loads(kept.read_text()) if kept and kept.exists() else []
    for number, (name, config) in enumerate(configurations(data).items()):
        if arguments.only not in (None, number):
            continue
        found = [(*planned(config), *trained(config)) for _ in range(arguments.rounds)]
        time, peak, guess, real_time, real_peak = map(statistics.median, zip(*found, strict=True))

        def off(value: float, real: float) -> str:
            return f"{value / real - 1:+.0%}"

        rows.append([
            name, f"{time * 1e3:.0f} ms", f"{real_time * 1e3:.0f} ms", off(time, real_time),
            f"{peak / 1e6:,.0f} MB", f"{real_peak / 1e6:,.0f} MB", off(peak, real_peak),
            f"{guess / 1e6:,.0f} MB ({off(guess, real_peak)})",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = [
        "configuration", "step, planned", "measured", "off", "peak, probed", "measured", "off",
        "peak from the configuration alone",
    ]  # fmt: skip
    if kept:
        kept.write_text(json.dumps(rows))
    if len(rows) == 3:
        write_result("plan_accuracy", "python -m benchmarks.plan_accuracy", table(head, rows))


if __name__ == "__main__":
    main()

"""各部分：先核对后量，各按价值排；seconds 是自己的上限，到了就放弃它，别的照走。"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from . import checks, decoding, figures, runs
from .log import Log, Row, Skip, synchronize


@dataclass(frozen=True)
class Part:
    name: str
    kind: Literal["check", "figure"]
    seconds: float
    run: Callable[[Log], None]

    @property
    def about(self) -> str:
        return {"check": "checks", "figure": "measures"}[self.kind]


PARTS = (
    Part("decisions", "check", 20, runs.decisions),
    Part("twins", "check", 40, checks.twins),
    Part("sdpa", "check", 20, checks.sdpa),
    Part("loss", "check", 40, checks.loss),
    Part("optimizers", "check", 20, checks.optimizers),
    Part("generate", "check", 90, runs.generate),
    Part("autocast", "check", 20, checks.autocast),
    Part("syncs", "check", 30, runs.syncs),
    Part("resume", "check", 45, runs.resume),
    Part("compiled", "check", 75, runs.compiled),
    Part("caches", "check", 15, runs.caches),
    Part("experts", "check", 20, checks.experts),
    Part("rope", "check", 10, checks.rope),
    Part("recompute", "check", 10, runs.recompute),
    Part("quantized", "check", 15, runs.quantized),
    Part("memory", "check", 10, runs.memory),
    Part("flex", "check", 120, checks.flex),
    Part("flex-rows", "check", 75, checks.flex_rows),
    Part("train-small", "figure", 90, figures.train_small),
    Part("decode", "figure", 60, decoding.decode),
    Part("nanogpt", "figure", 120, figures.nanogpt),
    Part("train-medium", "figure", 75, figures.train_medium),
    Part("head", "figure", 25, figures.head),
    Part("experts-speed", "figure", 20, figures.experts),
    Part("muon-speed", "figure", 60, figures.train_muon),
    Part("sparse", "figure", 120, figures.sparse),
    Part("interop", "check", 40, decoding.interop),
    Part("ranks", "check", 120, runs.ranks),
)


def chosen(only: Sequence[str]) -> list[Part]:
    """
    Raises:
        ValueError: 没有这个名字。
    """
    names = [part.name for part in PARTS]
    for name in only:
        if name not in names:
            raise ValueError(f"--only {name} is no part; the parts are {', '.join(names)}")
    return [part for part in PARTS if not only or part.name in only]


def lanes(parts: Sequence[Part], jobs: int) -> list[list[Part]]:
    """分成 jobs 份，时限之和相近；每份里仍按原来的次序。"""
    shares: list[list[Part]] = [[] for _ in range(jobs)]
    for part in sorted(parts, key=lambda part: -part.seconds):
        min(shares, key=lambda share: sum(one.seconds for one in share)).append(part)
    return [sorted(share, key=parts.index) for share in shares]


@dataclass(frozen=True)
class Place:
    """在哪里跑。until：全部的时间到什么时候为止（time.monotonic）。"""

    device: torch.device
    nanogpt: str
    until: float


def run_part(part: Part, place: Place, emit: Callable[[Row], object]) -> list[Row]:
    """一部分的各行；它的错误只是它的一行。"""
    toy = place.device.type == "cpu"
    until = min(time.monotonic() + part.seconds, place.until)
    log = Log(part.name, place.device, toy, until, place.nanogpt, emit)
    try:
        part.run(log)
        synchronize(place.device)
    except Skip as reason:
        log.skip("all of it", str(reason))
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        log.failed(f"{type(error).__name__}: {first} ({where})")
    finally:
        gc.collect()
    return log.rows

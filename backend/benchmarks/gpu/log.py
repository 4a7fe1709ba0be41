"""一部分做出的各行：核对、数字、跳过的话；与它所处的环境。"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Kind = Literal["check", "figure", "skip", "failed"]


@dataclass(frozen=True)
class Row:
    """表的一行。ok：None = 没有目标，只是一个数。"""

    part: str
    kind: Kind
    what: str
    value: str
    wanted: str = ""
    ok: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Skip(Exception):
    """这一部分这里做不了；理由是英文的一句。"""


@dataclass
class Log:
    """一部分在哪里跑、还剩多少秒、已有的各行。

    Attributes:
        emit: 每有一行就交出去：之后崩了也不丢。
        toy: 没有显卡：走同样的逻辑，尺寸是玩具。
    """

    part: str
    device: torch.device
    toy: bool
    until: float
    nanogpt: str
    emit: Callable[[Row], object]
    rows: list[Row] = field(default_factory=list)

    def pick(self, full: T, toy: T) -> T:
        return toy if self.toy else full

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def agrees(self, what: str, found: Tensor, wanted: Tensor, limit: float) -> None:
        """相对误差 max|a - b| / max|b| 至多 limit；NaN 不算过。"""
        a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
        if a.shape != b.shape:
            self._add("check", what, f"shape {tuple(a.shape)}", f"shape {tuple(b.shape)}", False)
            return
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        self._add("check", what, f"{error:.1e}", f"error <= {limit:.0e}", error <= limit)

    def equal(self, what: str, found: object, wanted: object) -> None:
        self._add("check", what, str(found), str(wanted), found == wanted)

    def holds(self, what: str, ok: bool, value: str, wanted: str) -> None:
        self._add("check", what, value, wanted, ok)

    def figure(self, what: str, value: str) -> None:
        self._add("figure", what, value, "", None)

    def goal(self, what: str, value: float, unit: str, *, least: float) -> None:
        """目标只在真的显卡上算数。"""
        ok = None if self.toy else value >= least
        self._add("figure", what, f"{value:.3g}{unit}", f">= {least:g}{unit}", ok)

    def near(self, what: str, value: float, *, within: float) -> None:
        """一个比值离 1 多远。"""
        ok = None if self.toy else abs(value - 1) <= within
        self._add("figure", what, f"{value:.3f}", f"1 +- {within:g}", ok)

    def skip(self, what: str, reason: str) -> None:
        self._add("skip", what, reason, "", None)

    def failed(self, what: str) -> None:
        self._add("failed", self.part, what, "", False)

    def _add(self, kind: Kind, what: str, value: str, wanted: str, ok: bool | None) -> None:
        row = Row(self.part, kind, what, value, wanted, ok)
        self.rows.append(row)
        self.emit(row)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, job: Callable[[], object], rounds: int) -> float:
    """rounds 次里的中位数；先跑一次热身。GPU 上每次都等它做完。"""
    job()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        job()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]

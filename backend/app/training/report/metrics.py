"""metrics.jsonl：一行一个 JSON 对象，只追加；续训时先截回到续训的那一步，所以没有重复。"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from app.common.files import write_atomic
from app.common.tell import Tell

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """全部完整的行；被杀时写了一半的最后一行不算。"""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class Sink(Protocol):
    """跟着 metrics.jsonl 走的另一个去处：报告、TensorBoard。"""

    name: str

    def write(self, row: dict[str, Any]) -> object: ...

    def sync(self) -> object:
        """metrics.jsonl 刚落盘：每次验证之后与保存之前。"""

    def close(self) -> object: ...


class Metrics:
    """追加写。写不下去（盘满）时警告一次，训练照常。

    行的 kind："train" 完成了第 step 步；"skipped" 那一步没有更新；"groups" 那一步各层组的梯度；
    "moe" 那一步各 MoE 层的负载；
    "eval"、"memory"、"sample" 做完 step 步后的验证、内存、样文；"ending" 从这一步之后开始收尾。
    "train" 里 scored 是计分的词元（DPO：对）的个数，另有目标自己的数；"eval" 有几个验证集时，set 是
    决定 best 的那个，sets 是别的 {名字: {loss, measured, …}}。
    JSON 没有 NaN，非有限数写成 null。
    """

    def __init__(self, path: Path, resume_step: int, tell: Tell) -> None:
        self._tell = tell
        # 写坏过的去处：里面少了东西。
        self.failed: list[str] = []
        self._sinks: list[Sink] = []
        kept = [row for row in read_metrics(path) if _before(row, resume_step)]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode("utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def add(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def write(self, row: dict[str, Any]) -> None:
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._guard(lambda: self._file.write(json.dumps(clean) + "\n"))
        self._pass_on(lambda sink: sink.write(clean))
        if row["kind"] == "eval":
            self.sync()

    def sync(self) -> None:
        """保存检查点之前调用：检查点之前的行必须在盘上。"""
        self._guard(self._flush)
        self._pass_on(lambda sink: sink.sync())

    def _pass_on(self, action: Callable[[Sink], object]) -> None:
        """一个去处坏了就不再用它。

        它们失败的样子各异（别人的库在自己的线程里写），而显示不该毁掉训练，所以什么都接住。
        """
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self.failed.append(sink.name)
                reason = f"{type(error).__name__}: {error}"
                self._tell(f"warning: cannot write {sink.name}: {reason}; training goes on")

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if METRICS not in self.failed:
                self._tell(f"warning: cannot write {METRICS}: {error}; training goes on")
                self.failed.append(METRICS)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._guard(self._file.close)
        self._pass_on(lambda sink: sink.close())


def _before(row: dict[str, Any], step: int) -> bool:
    """检查点 step 之后还会重做的：做完第 step 步时的验证、样文与收尾，和此后的一切。"""
    redone = row.get("kind") in ("eval", "memory", "sample", "answers", "ending")
    return row["step"] < step if redone else row["step"] <= step

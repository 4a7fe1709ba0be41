"""metrics.jsonl：一行一个 JSON 对象，只追加；续训时先截回到续训的那一步，所以没有重复。"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoint import Tell

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


class Metrics:
    """追加写。写不下去（盘满）时警告一次，训练照常。

    行的 kind："train" 完成了第 step 步；"skipped" 那一步没有更新；"eval" 做完 step 步后的验证。
    JSON 没有 NaN，非有限数写成 null。
    """

    def __init__(self, path: Path, resume_step: int, tell: Tell) -> None:
        self._tell, self._failed = tell, False
        kept = [row for row in read_metrics(path) if _before(row, resume_step)]
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._guard(lambda: self._file.write(json.dumps(clean) + "\n"))

    def sync(self) -> None:
        """保存检查点之前调用：检查点之前的行必须在盘上。"""
        self._guard(self._flush)

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._failed:
                self._tell(f"warning: cannot write {METRICS}: {error}; training goes on")
            self._failed = True

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._guard(self._file.close)


def _before(row: dict[str, Any], step: int) -> bool:
    """检查点 step 之后还会重做的：第 step 步之前的验证，和此后的一切。"""
    return row["step"] < step if row.get("kind") == "eval" else row["step"] <= step

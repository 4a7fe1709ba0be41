"""一次训练的历史：把 metrics.jsonl 读成列，可以接着上次读到的地方继续。

N 步数。一行一个字典要几百字节，几十万步的训练会因一张图占去几百兆；列只要几十字节一步。
"""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

_COLUMNS = ("step", "loss", "grad_norm", "lr", "tokens", "seconds", "scored")


class History:
    """Attributes:
    others: "train" 以外的行，按次序。
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.others: list[dict[str, Any]] = []
        self._columns = {name: array("d") for name in _COLUMNS}
        self._offset = 0

    def refresh(self) -> None:
        """读入新写的完整的行；没有文件就还没有历史。"""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                # 写到一半的最后一行留给下一次。
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        if row.get("kind") == "train":
            for name, column in self._columns.items():
                column.append(_number(row.get(name)))
        else:
            self.others.append(row)

    def column(self, name: str) -> np.ndarray:
        """(N,)；没有记下或不是有限数的是 NaN。name 是 train 行里的一项。"""
        return np.array(self._columns[name])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.others if row.get("kind") == kind]

    def evals(self) -> tuple[np.ndarray, np.ndarray]:
        """(步, 验证损失)，只有有限的；画曲线用，其中可能有不同的尺子量的。"""
        return _losses(self.of("eval"))

    def like_evals(self) -> tuple[np.ndarray, np.ndarray]:
        """evals 里与最近一次在同样的数据与窗口上量的：只有它们之间能比出最好的。"""
        rows = self.of("eval")
        newest = rows[-1].get("measured") if rows else None
        return _losses([row for row in rows if row.get("measured") == newest])

    @property
    def last_step(self) -> int:
        steps = self._columns["step"]
        return int(steps[-1]) if steps else 0


def _losses(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    rows = [r for r in rows if not math.isnan(_number(r.get("loss")))]
    return (
        np.array([r["step"] for r in rows], dtype=float),
        np.array([r["loss"] for r in rows], dtype=float),
    )


def _number(value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else math.nan

"""一种做法一个子进程：标准输入来一行走一步，答一行数。几种做法轮流走，谁也不占着别人的线程。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Worker:
    """python -m MODULE WORDS…，它先说 ready，每步说 step 与几个数。"""

    def __init__(self, module: str, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )  # fmt: skip
        self.answer("ready")

    def answer(self, kind: str) -> list[float]:
        """下一行以 kind 开头的，其余的数。

        Raises:
            RuntimeError: 子进程先结束了。
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(kind):
                return [float(word) for word in line.split()[1:]]
        raise RuntimeError("the worker ended early")

    def step(self) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer("step")

    def close(self, last: str | None = None) -> list[float]:
        """last：它结束之前还说哪一行。"""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = [] if last is None else self.answer(last)
        self._process.wait()
        return found


def peak() -> int:
    """这个进程至今内存的峰值，字节。"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

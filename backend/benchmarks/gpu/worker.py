"""干活的进程与看着它的进程：显卡上的非法访问会毁掉整个进程，卡住的核谁也叫不醒。

于是各部分在一个子进程里依次跑，一行一行交出来；它死了或一部分过了时限，记下那一部分，余下的换一个
新的子进程。
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch

from .log import Row, synchronize
from .parts import Part, Place, chosen, run_part

_MARK = "@gpu "
# 过了自己的时限再等这么久，才当作卡住了：部分自己会看钟。
GRACE = 20.0
# 第一个字之前：导入 torch、建 CUDA 的上下文。
START = 90.0
# 显卡的上下文坏了：换一个进程。
BROKEN = 70


def work(names: Sequence[str], place: Place) -> int:
    """子进程：依次做 names，每行一个 JSON。"""
    # cuBLAS 的确定的算法要它，须在建上下文之前。
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for part in chosen(names):
        _send(begin=part.name)
        run_part(part, place, lambda row: _send(row=row.to_dict()))
        _send(end=part.name)
        try:
            synchronize(place.device)
        except RuntimeError:
            return BROKEN
    return 0


def _send(**message: Any) -> None:
    print(_MARK + json.dumps(message), flush=True)


class Watch:
    """看着子进程做完 parts；rows 是到手的各行。"""

    def __init__(
        self, command: Callable[[Sequence[str]], list[str]], tell: Callable[[Row], object]
    ) -> None:
        """command(names) -> 做这几部分的命令；tell：每到一行就说。"""
        self._command, self._tell = command, tell
        self.rows: list[Row] = []

    def run(self, parts: Sequence[Part], until: float) -> None:
        waiting = list(parts)
        while waiting:
            if time.monotonic() >= until:
                for part in waiting:
                    self._add(part, "skip", "all of it", "the budget of time ended before it")
                return
            waiting = waiting[self._some(waiting, until) :]

    def _some(self, parts: Sequence[Part], until: float) -> int:
        """一个子进程做完了几部分（没做完的那一部分也算：它已记作失败）。"""
        process = subprocess.Popen(
            self._command([part.name for part in parts]), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        done, begun = 0, False
        limit = time.monotonic() + START
        while done < len(parts):
            try:
                line = lines.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                process.kill()
                process.wait()
                return self._lost(parts[done], done, "it ran past its limit and was ended")
            if line is None:
                code = process.wait()
                if done and not begun:
                    # 上一部分毁了显卡的上下文（那一行已经记下）：换一个进程接着走。
                    return done
                return self._lost(parts[done], done, f"its process ended with code {code}")
            if not line.startswith(_MARK):
                print(line, end="", flush=True)
                continue
            message = json.loads(line[len(_MARK) :])
            if "begin" in message:
                begun = True
                allowed = min(parts[done].seconds, until - time.monotonic())
                limit = time.monotonic() + max(0.0, allowed) + GRACE
            elif "row" in message:
                row = Row(**message["row"])
                self.rows.append(row)
                self._tell(row)
            else:
                done, begun = done + 1, False
                limit = time.monotonic() + GRACE
                if time.monotonic() >= until:
                    process.kill()
                    break
        process.wait()
        return done

    def _lost(self, part: Part, done: int, reason: str) -> int:
        self._add(part, "failed", part.name, reason)
        return done + 1

    def _add(self, part: Part, kind: Any, what: str, reason: str) -> None:
        row = Row(part.name, kind, what, reason, "", False if kind == "failed" else None)
        self.rows.append(row)
        self._tell(row)


def _pump(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def command(place: Place) -> Callable[[Sequence[str]], list[str]]:
    """本程序自己，当子进程。"""

    def build(names: Sequence[str]) -> list[str]:
        left = f"{max(0.0, place.until - time.monotonic()):.0f}"
        return [
            sys.executable, "-m", "benchmarks.gpu", "--worker", "--device", str(place.device),
            "--budget", left, "--nanogpt", place.nanogpt, "--only", *names,
        ]  # fmt: skip

    return build


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

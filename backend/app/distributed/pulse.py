"""谁在等、谁没有来：集合操作超时只说"等了 600 秒"，不说等谁。

每个 rank 有一个线程，每秒把自己主线程此刻在哪里写进 store：在 comm.py 里的是在等别人，
在别处的就是别人等的那个；久不写的（进程停住了）也算。
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import Store

EVERY_S = 1.0
# 这么久没有写：连线程都停了（SIGSTOP、死锁在持有 GIL 的地方、机器没了）。
SILENT_S = 5.0
_APP = Path(__file__).parents[1]
_COMM = str(Path(__file__).with_name("comm.py"))


class Pulse:
    """从建立的线程（主线程）看起；`with Pulse(...) as pulse:`。"""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._main, self._over = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(2 * EVERY_S)

    def missing(self) -> str:
        """一句话：哪几个 rank 没有在等，各在哪里；说不出就是空的。"""
        lines = [self._about(rank) for rank in range(self._size) if rank != self._rank]
        return "; ".join(line for line in lines if line)

    def _about(self, rank: int) -> str:
        # store 可能随 rank 0 一起没了：那就少说一句。
        with contextlib.suppress(RuntimeError, ValueError):
            if not self._store.check([_key(rank)]):
                return f"rank {rank} never reported"
            seen = json.loads(self._store.get(_key(rank)))
            silent = time.time() - seen["time"]
            if silent > SILENT_S:
                return f"rank {rank} was last heard of {silent:.0f} s ago, in {seen['place']}"
            if not seen["waiting"]:
                return f"rank {rank} was not waiting but in {seen['place']}"
        return ""

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while True:
                frame = sys._current_frames().get(self._main)
                said = _place(frame) | {"time": time.time()}
                self._store.set(_key(self._rank), json.dumps(said))
                if self._over.wait(EVERY_S):
                    return


def _key(rank: int) -> str:
    return f"pulse/{rank}"


def _place(frame: FrameType | None) -> dict[str, Any]:
    """最里面的一个属于本项目的地方，与是不是在集合操作里。"""
    place, waiting = "an unknown place", False
    while frame is not None:
        code = frame.f_code
        waiting = waiting or code.co_filename == _COMM
        path = Path(code.co_filename)
        if place == "an unknown place" and path.is_relative_to(_APP):
            place = f"{path.relative_to(_APP)}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return {"place": place, "waiting": waiting}

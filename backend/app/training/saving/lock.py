"""一个训练文件夹同时只许一个训练进程。

锁由内核持有（进程一死就放开），文件里的 pid 与主机名只为说明是谁；
两个进程抢同一把陈旧的锁，也只有一个得到。
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.common.tell import Tell

LOCK = "trainer.lock"
# 别人占着时 flock 与 Windows 的 locking 给出的错误；其余的是这个文件系统不能上锁。
_HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}


class RunLocked(ValueError):
    """另一个进程正在训练这个文件夹。"""


@contextmanager
def run_lock(run: Path, tell: Tell = print) -> Iterator[None]:
    """持有 run 的锁。

    得到了内核的锁，文件里写着谁都不再要紧：容器每次换主机名，死掉的那个不该挡住续训。

    Raises:
        RunLocked: 锁被占，信息里有占用者的 pid 与主机名。
        OSError: 这个文件系统不能上锁。
    """
    path = run / LOCK
    with path.open("a+", encoding="utf-8") as file:
        owner = _owner(path)
        if not _try_lock(file):
            raise RunLocked(f"{run} is being trained by {_name(owner)}: stop it or use another out")
        if owner is not None:
            tell(f"took over the lock of {_name(owner)}, which has ended without releasing it")
        _write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        try:
            yield
        finally:
            _write(file, "")


def _owner(path: Path) -> dict[str, object] | None:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not text:
        return None
    try:
        owner = json.loads(text)
    except ValueError:
        owner = None
    # 写到一半被杀会留下残文。
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, object] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _try_lock(file: IO[str]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            # 锁住远处的一个字节：Windows 上被锁的字节不可读，而内容要给别人看。
            file.seek(1 << 30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise OSError(
            f"{file.name} cannot be locked ({error}): put the run on a file system with locks"
        ) from error
    return True

"""`--ranks N`：在这台机器上起 N 个进程，各做一个 rank，像 torchrun 那样给它们环境变量。

多台机器、失败重启用 torchrun。本文件不导入 torch：起进程的这个不做别的事。
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# 一个 rank 失败之后，给别的多久自己报错、退出。
AFTER_FAILURE_S = 30.0
_POLL_S = 0.05
_PARENT = "GPT2_RANKS_PARENT"
_ROOT = Path(__file__).parents[2]


def place() -> tuple[int, int] | None:
    """(rank, rank 数)：由 torchrun、--ranks 或集群设好；没有就是 None。"""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        return None


def local_ranks() -> int:
    """这台机器上几个 rank。"""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def orphaned() -> bool:
    """由 --ranks 起的进程，而起它的那个已经不在了。"""
    parent = os.environ.get(_PARENT)
    return parent is not None and os.getppid() != int(parent)


def start_ranks(count: int, argv: Sequence[str]) -> int:
    """N 个 `gpt2 ARGV`，一个线程一个；返回退出码：都成功是 0，否则是先失败的那个的。"""
    shared = _environment(count)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "app.cli", *argv],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            # 终端的 Ctrl-C 只到这里，由这里转给每个 rank 一次：两次就是立即退出了。
            process_group=0,
        )
        for rank in range(count)
    ]
    try:
        with _passing_on(children):
            return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


def without_ranks(argv: Sequence[str]) -> list[str]:
    """去掉 --ranks N：起的每个进程收到其余的。"""
    words, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word == "--ranks":
            skip = True
        elif not word.startswith("--ranks="):
            words.append(word)
    return words


def _environment(count: int) -> dict[str, str]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {
        "PYTHONPATH": path,
        _PARENT: str(os.getpid()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        # N 个进程各占一个核；线程数不同，末位也不同。
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # 重启之后旧的键留在共享的 store 里，新的一代就连不上（pytorch #135712）。
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _passing_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """收到的信号转给每个 rank：它们商定在哪一步停。"""

    def hand_on(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: int | None = None
    end = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(_POLL_S)
        bad = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
        if bad and failed is None:
            failed, end = bad[0], time.monotonic() + AFTER_FAILURE_S
    bad = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
    if failed is None:
        failed = bad[0] if bad else None
    return 0 if failed is None else _code(failed, children[failed].returncode)


def _code(rank: int, code: int) -> int:
    """被信号结束的没有机会自己说。"""
    if code >= 0:
        return code
    print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return 128 - code

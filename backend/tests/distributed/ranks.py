"""在 fork 出来的几个进程里跑同一个函数：gloo、FileStore，不到一秒就绪。"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 60.0
COLLECTIVE_S = 20.0


def run_ranks(size: int, job: Callable[..., Any], *args: Any, limit: float = LIMIT_S) -> list[Any]:
    """各 rank 的 job(*args) 的返回值（可以 pickle 的），按 rank 排；任何一个失败就失败。

    job 在子进程里：默认进程组已经建好（gloo），一个线程，种子 0。
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children, ears = [], []
        for rank in range(size):
            ear, mouth = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(rank, size, Path(folder) / "store", mouth, job, args)
            )
            child.start()
            mouth.close()
            children.append(child)
            ears.append(ear)
        try:
            return _listen(ears, limit)
        finally:
            for child in children:
                child.kill()
                child.join()


def _listen(ears: list[Connection], limit: float) -> list[Any]:
    found: dict[int, Any] = {}
    end = time.monotonic() + limit
    while len(found) < len(ears):
        open_ears = [ear for rank, ear in enumerate(ears) if rank not in found]
        ready = wait(open_ears, max(0.0, end - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(ears))) - set(found))
            raise TimeoutError(f"ranks {missing} did not answer within {limit} s")
        for ear in ready:
            assert isinstance(ear, Connection)
            rank = ears.index(ear)
            try:
                good, value = torch.load(io.BytesIO(ear.recv_bytes()), weights_only=False)
            except EOFError:
                raise AssertionError(f"rank {rank} died without an answer") from None
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            found[rank] = value
    return [found[rank] for rank in range(len(ears))]


def _child(
    rank: int, size: int, store: Path, mouth: Connection, job: Callable[..., Any], args: Any
) -> None:
    code = 0
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        _send(mouth, (True, job(*args)))
        # 先关的会让还在通信的对方报错：等大家都到这里。
        dist.barrier()
    except BaseException:
        code = 1
        _send(mouth, (False, traceback.format_exc()))
    finally:
        mouth.close()
        os._exit(code)


def _send(mouth: Connection, answer: tuple[bool, Any]) -> None:
    """不用管道自己的 pickle：那样张量只传一个句柄，进程结束就没了。"""
    out = io.BytesIO()
    torch.save(answer, out)
    mouth.send_bytes(out.getvalue())

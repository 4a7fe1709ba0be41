"""进程组：torchrun 或 --ranks 起的进程怎样认识彼此；别的 rank 没了时怎样说。"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from .config import ParallelConfig
from .mesh import Mesh, build_mesh
from .pulse import Pulse

# gloo 的错误就是 RuntimeError，只能从文字认出。
_LOST = ("gloo", "connection", "timed out", "nccl", "socket", "broken pipe")


@contextlib.contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[Mesh]:
    """在 RANK、WORLD_SIZE 已由启动者设好的进程里：等齐各 rank，给出网格，最后散去。

    Args:
        device: "cpu" 或 "cuda"；GPU 的张量走 NCCL，主机上的（判决、计数）总走 gloo。

    Raises:
        ConnectionError: 别的 rank 结束了或不动了。
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1:
        yield Mesh()
        return
    limit = timedelta(seconds=config.timeout_s)
    with _explained(None, rank):
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=limit))
        # 重启之后 store 里还有上一代的键。
        store = dist.PrefixStore(f"gpt2/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    with Pulse(store, rank, size) as pulse, _explained(pulse, rank):
        yield build_mesh(config, device)
        # 先走的会让还在通信的对方报错；出错时不等，也不拆：NCCL 会在那里卡住。
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def _explained(pulse: Pulse | None, rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError)
        if not lost and not any(sign in str(error).lower() for sign in _LOST):
            raise
        who = "" if pulse is None else pulse.missing()
        reason = str(error).strip().split("\n")[0][:200]
        raise ConnectionError(
            f"rank {rank} lost the other ranks: {who or 'one of them has ended'} ({reason}); what "
            "happened there is said above or in its own output; --resume auto goes on from the "
            "newest checkpoint"
        ) from error

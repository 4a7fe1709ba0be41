"""一行的词元分到几个 rank：各自发出的字节与内存的峰值，与一个进程相比（float32，一步）。

    cd backend && python -m benchmarks.context_parallel           # 65,536 个词元，窗口 256
    cd backend && python -m benchmarks.context_parallel --tokens 8192 --ways halo gather ring

每种做法各在新 fork 的进程里；峰值是一步使驻留内存涨了多少，取各 rank 里最大的。
各 rank 在同一台机器上，所以秒数只说明没有卡住，不说明快慢。
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from app.common.memory import resident_memory, resident_peak
from app.distributed.comm import Ranks
from app.distributed.ways.context import split_context
from app.models.transformer import GPT2Config, GPT2Model

from .common import table, write_result

VOCAB = 256


class Counted(Ranks):
    """记下这个 rank 发给别人的字节。"""

    sent = 0

    def _note(self, count: float) -> None:
        type(self).sent += round(count)

    def sum(self, x: Tensor) -> Tensor:
        # 参数的梯度，每步一次，与词元数无关：不是上下文的花费。
        return super().sum(x)

    def gather(self, x: Tensor) -> Tensor:
        self._note(x.nbytes * (self.size - 1))
        return super().gather(x)

    def exchange(self, x: Tensor) -> Tensor:
        self._note(x.nbytes * (self.size - 1) / self.size)
        return super().exchange(x)

    def pass_on(self, x: Tensor, by: int = 1) -> Tensor:
        self._note(x.nbytes)
        return super().pass_on(x, by)

    def shift(self, x: Tensor, by: int) -> Tensor:
        self._note(x.nbytes * (0 <= self.rank + by < self.size))
        return super().shift(x, by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["halo", "ulysses"])
    args = parser.parse_args()
    shape = {
        "vocab_size": VOCAB, "context_size": args.tokens, "n_layer": args.layers, "n_head": 4,
        "n_embed": args.width, "dropout": 0.0, "norm": "pre", "position": "rope",
        "attention_pattern": f"local({args.window})",
    }  # fmt: skip
    alone = launch(1, "one process", shape)[0]
    rows = [["one process", 0, megabytes(alone["peak"]), "100%", f"{alone['seconds']:.1f}", ""]]
    for way in args.ways:
        found = launch(args.ranks, way, shape)
        peak = max(one["peak"] for one in found)
        loss = sum(one["loss"] for one in found)
        rows.append(
            [
                f"{way}, {args.ranks} ranks",
                f"{max(one['sent'] for one in found):,}",
                megabytes(peak),
                f"{peak / alone['peak']:.0%}",
                f"{max(one['seconds'] for one in found):.1f}",
                f"{abs(loss - alone['loss']):.1e}",
            ]
        )
    header = ["way", "bytes sent by a rank", "peak of a rank", "of one", "s", "loss off by"]
    words = (
        f"{args.tokens:,} tokens, {args.layers} layers of width {args.width}, "
        f"local({args.window}), forward and backward:\n\n"
    )
    ways = " ".join(args.ways)
    write_result(
        f"context_parallel_{args.tokens}",
        f"cd backend && python -m benchmarks.context_parallel --tokens {args.tokens} --ways {ways}",
        words + table(header, rows),
    )


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB"


def launch(size: int, way: str, shape: dict[str, Any]) -> list[dict[str, float]]:
    """各 rank 的结果。"""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ears = []
        for rank in range(size):
            ear, mouth = context.Pipe(duplex=False)
            context.Process(
                target=child, args=(rank, size, Path(folder) / "store", mouth, way, shape)
            ).start()
            ears.append(ear)
        return [ear.recv() for ear in ears]


def child(
    rank: int, size: int, store: Path, mouth: Connection, way: str, shape: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size
    )
    mouth.send(one_step(way, shape))
    dist.barrier()
    dist.destroy_process_group()


def one_step(way: str, shape: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    model, ranks = GPT2Model(GPT2Config(**shape)), Counted.of(dist.group.WORLD)
    batch = torch.randint(VOCAB, (1, shape["context_size"] + 1))
    x, y = batch[:, :-1], batch[:, 1:]
    if ranks.size > 1:
        split = split_context(model, ranks, way)
        x, y = split.batch(x), split.batch(y)
    before, start = resident_memory(), time.perf_counter()
    loss = model(x, targets=y)["loss"] / ranks.size
    loss.backward()
    if ranks.size > 1:
        split.finish_gradients()
    peak = resident_peak()
    assert before is not None and peak is not None, "this system does not tell its memory"
    return {
        "peak": peak - before,
        "sent": Counted.sent,
        "loss": float(loss.detach()),
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()

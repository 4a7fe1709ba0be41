"""一个 rank 的内存：GPT-2 Medium 切成 1、2、4 片，量到的与 `gpt2 plan --ranks` 说的。

量到的是进程的峰值减去导入 torch 之后的，含 gloo 的副本与分配器留着的；规划的只数张量。
在 backend/ 里跑，4 片时四个进程同在这台机器上，共要约 12 GB：

    python -m benchmarks.shard_memory
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from app.common.memory import resident_memory, resident_peak
from app.distributed.comm import Ranks
from app.distributed.config import ParallelConfig
from app.distributed.sharding.shard import shard_model
from app.distributed.sharding.start import empty_model, initialize_shards
from app.models.transformer import GPT2Config
from app.planning.ranks import fake_world, walk
from app.planning.tracked import Way, take_step
from app.training.config import TrainConfig
from app.training.optim.build import build_optimizer
from benchmarks.common import table, write_result

STEPS, ROUNDS = 2, 2


def configuration(layers: int, tokens: int, shard: int) -> TrainConfig:
    shape = GPT2Config(
        vocab_size=50304, context_size=tokens, n_layer=layers, n_head=16, n_embed=1024,
        norm="pre", dropout=0.0,
    )  # fmt: skip
    return TrainConfig(
        model=shape, batch_size=ROUNDS * shard, micro_batch=1, parallel=ParallelConfig(shard=shard)
    )


def planned(config: TrainConfig) -> int:
    with fake_world(1, config.parallel.shard) as mesh, FakeTensorMode():
        return walk(config, config.model.n_layer, mesh, 1, ROUNDS).peak["Total"]


def measured(rank: int, config: TrainConfig, folder: str) -> None:
    torch.set_num_threads(1)
    size = config.parallel.shard
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size
    )
    mesh = init_device_mesh("cpu", (size,))
    base = resident_memory() or 0
    model = empty_model(config.model).train()
    shard_model(model, mesh, exact=True)
    initialize_shards(model, config.model, torch.device("cpu"))
    optimizer, _ = build_optimizer(model, config.optim)
    x = torch.zeros((1, config.model.context_size), dtype=torch.int64)
    way = Way(Ranks.of(mesh.get_group()), Ranks(), True)
    for _ in range(STEPS):
        take_step(model, optimizer, [[(x, x)]] * ROUNDS, way, lambda: None)
    Path(folder, f"rank{rank}").write_text(str((resident_peak() or 0) - base))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    rows: list[list[object]] = []
    for shard in args.shards:
        config = configuration(args.layers, args.tokens, shard)
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(measured, (config, folder), nprocs=shard)
            most = max(int(path.read_text()) for path in Path(folder).glob("rank*"))
        plan = planned(config)
        rows.append([shard, f"{plan / 1e6:,.0f}", f"{most / 1e6:,.0f}", f"{most / plan:.2f}"])
    body = table(["shards", "planned, MB a rank", "measured, MB a rank", "ratio"], rows)
    command = (
        f"python -m benchmarks.shard_memory --layers {args.layers} --tokens {args.tokens} "
        f"--shards {' '.join(map(str, args.shards))}"
    )
    write_result("shard_memory", command, body)


if __name__ == "__main__":
    main()

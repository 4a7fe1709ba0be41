"""GPT-2 Small 的一步训练：我们的三种跑法、nanoGPT、transformers，同批、同优化器、float32。

cd backend && python -m benchmarks.train_step 1x1024 --nanogpt ../../nanoGPT

每种跑法是一个子进程（峰值内存才各是各的），由这里轮流叫它们各走一步；同一时刻只有一个在算。
nanoGPT 由运行的人自己克隆在旁边。
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.planning.flops import flops_per_token

from .common import interleaved, table, write_result
from .worker import Worker, peak

VOCAB = 50304
WAYS = {
    "ours": "eager",
    "ours-compiled": "compiled per block",
    "ours-checkpointed": "eager, activation checkpointing",
    "nanogpt": "eager",
    "nanogpt-compiled": "compiled",
    "transformers": "eager",
}
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(way: str, dropout: float) -> tuple[nn.Module, Loss]:
    from app.training.machine.recompute import checkpoint_blocks

    model = GPT2Model(GPT2Config(vocab_size=VOCAB, norm="pre", dropout=dropout))
    if way == "ours-compiled":
        for block in model.h.values():
            block.compile()
    if way == "ours-checkpointed":
        checkpoint_blocks(model, range(12))
    return model, lambda x, y: model(x, targets=y)["loss"]


def nanogpt(way: str, dropout: float, clone: str) -> tuple[nn.Module, Loss]:
    sys.path.insert(0, clone)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(GPTConfig(vocab_size=VOCAB, dropout=dropout))
    run = torch.compile(model) if way == "nanogpt-compiled" else model
    return model, lambda x, y: run(x, y)[1]


def transformers(way: str, dropout: float) -> tuple[nn.Module, Loss]:
    import torch.nn.functional as F
    from transformers import GPT2Config as Config
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(
        Config(vocab_size=VOCAB, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    )
    return model.train(), lambda x, y: F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


def work(way: str, rows: int, length: int, dropout: float, clone: str) -> None:
    """子进程：标准输入每来一行走一步，回答用时与至今的峰值。"""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    family = way.split("-")[0]
    if family == "nanogpt":
        model, loss = nanogpt(way, dropout, clone)
    else:
        model, loss = {"ours": ours, "transformers": transformers}[family](way, dropout)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.randint(0, VOCAB, (rows, length + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        value = loss(x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print("step", time.perf_counter() - start, peak(), value.item(), flush=True)


def gemm_peak() -> float:
    """这台机器一次大矩阵乘的速度，每秒浮点运算：一步的下限由它算出。"""
    n = 2048
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    jobs = {
        "mkl": lambda: torch.mm(a, b, out=out),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    }
    return 2 * n**3 / min(interleaved(jobs, 9).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="rows x tokens, such as 1x1024")
    parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--way", help="run as the worker of one way")
    args = parser.parse_args()
    rows, length = map(int, args.shape.split("x"))
    if args.way:
        work(args.way, rows, length, args.dropout, args.nanogpt)
        return
    torch.set_num_threads(2)
    ways = [way for way in args.ways if args.nanogpt or not way.startswith("nanogpt")]
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    speed = gemm_peak()
    same = [args.shape, "--nanogpt", args.nanogpt, "--dropout", str(args.dropout)]
    workers = {way: Worker("benchmarks.train_step", *same, "--way", way) for way in ways}
    for index in range(args.rounds + 1):
        for way, worker in workers.items():
            result = worker.step()
            print(index, way, result, flush=True)
            if index:
                found[way].append(result)
    for worker in workers.values():
        worker.close()
    report(args, rows * length, length, found, speed)


def report(
    args: argparse.Namespace, tokens: int, length: int, found: dict[str, list[list[float]]],
    speed: float,
) -> None:  # fmt: skip
    medians = {way: statistics.median(r[0] for r in results) for way, results in found.items()}
    peaks = {way: max(r[1] for r in results) for way, results in found.items()}
    shape = GPT2Config(vocab_size=VOCAB, norm="pre", context_size=1024)
    floor = flops_per_token(shape, length).total * tokens / speed
    lines = []
    for way, seconds in medians.items():
        cells: list[object] = [way.split("-")[0], WAYS[way], f"{seconds:.2f}"]
        for other in ("nanogpt", "nanogpt-compiled"):
            cells.append(f"{medians[other] / seconds:.2f}x" if other in medians else "-")
        memory = f"{peaks[way] / peaks['nanogpt']:.2f}x" if "nanogpt" in peaks else "-"
        lines.append([*cells, f"{peaks[way] / 1e6:,.0f}", memory])
    body = table(
        ["what", "how", "seconds a step", "speed vs nanoGPT eager", "vs nanoGPT compiled"]
        + ["peak MB", "of nanoGPT's peak"],
        lines,
    )
    body += (
        f"\n\nGPT-2 Small (12 layers, width 768, vocabulary {VOCAB:,}), {args.shape} tokens, "
        f"float32, dropout {args.dropout:g}, fused AdamW and clipping for all; the ways take "
        f"turns, median of {args.rounds} steps after one to warm up. The floor is {floor:.2f} s: "
        f"the products of a step at the {speed / 1e9:.0f} GFLOP/s of one large product."
    )
    name = f"train_step_{args.shape}" + (f"_dropout{args.dropout:g}" if args.dropout else "")
    command = f"python -m benchmarks.train_step {args.shape} --nanogpt ../../nanoGPT"
    if args.dropout:
        command += f" --dropout {args.dropout:g}"
    write_result(name, f"cd backend && {command}", body)


if __name__ == "__main__":
    main()

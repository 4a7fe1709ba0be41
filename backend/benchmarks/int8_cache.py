"""int8 键值缓存的代价：验证集上的困惑度、logits 的误差、字节数与速度，与 float32 的缓存比。

gpt2 prepare --out data/stdlib
gpt2 train --config quickstart --steps 300 --out runs/learned
gpt2 train --config quickstart --steps 300 --out runs/rope --model.position rope
cd backend && python -m benchmarks.int8_cache --run ../runs/rope ../runs/learned \\
    --data ../data/stdlib
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from app.data.shards import TokenDataset
from app.models.transformer import GPT2Model, KVCache, create_gpt2_small
from app.models.transformer.cache.kv_dtype import KVDtype
from app.training.saving.checkpoint import resolve_checkpoint

from .common import interleaved, table, write_result


@dataclass(frozen=True)
class Scores:
    """logits (B, T, V)；nll (B,) 各窗口的平均负对数似然；缓存的字节数。"""

    logits: Tensor
    nll: Tensor
    nbytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="+", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--held", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for run in args.run for row in quality(run, args.data, args.windows)]
    header = [
        "run, checkpoint",
        "chunk",
        "relative logit error",
        "perplexity float32",
        "perplexity int8",
    ]
    header += ["cost", "cache bytes float32", "int8", "ratio"]
    body = table(header, rows)
    body += (
        f"\n\n{args.windows} windows of one context, spread over the validation data, scored in "
        "chunks through the cache: 1 = as when decoding. relative logit error: root mean square "
        "of the difference over that of the float32 logits. cost: relative rise of perplexity, "
        "± two standard errors of the paired difference over windows.\n\n"
    )
    write_result("int8_cache", command(args), body + speed(args.held, args.steps, args.rounds))


def command(args: argparse.Namespace) -> str:
    """文件夹只写名字：它们在哪里与结果无关。"""
    runs = " ".join(shlex.quote(f"../runs/{run.name}") for run in args.run)
    rest = "" if "--windows" not in sys.argv else f" --windows {args.windows}"
    data = shlex.quote(f"../data/{args.data.name}")
    return f"cd backend && python -m benchmarks.int8_cache --run {runs} --data {data}{rest}"


def quality(run: Path, data: Path, windows: int) -> list[list[object]]:
    folder = resolve_checkpoint(run, tell=lambda text: print(text, file=sys.stderr))
    model = GPT2Model.from_pretrained(folder)
    ids = validation_windows(TokenDataset.open(data / "val"), model.config.context_size, windows)
    whole = score(model, ids, ids.shape[1], None)
    rows: list[list[object]] = []
    for chunk in (1, 32):
        exact, rounded = score(model, ids, chunk, None), score(model, ids, chunk, "int8")
        # 分块只带来舍入：先确认，误差才能归给 int8。
        assert error(exact, whole) < 1e-5
        extra = rounded.nll - exact.nll
        doubt = 2 * float(extra.std()) / math.sqrt(len(extra))
        rows.append(
            [
                f"{run.name}, {folder.name}",
                chunk,
                f"{error(rounded, exact):.4f}",
                f"{math.exp(float(exact.nll.mean())):.3f}",
                f"{math.exp(float(rounded.nll.mean())):.3f}",
                f"{100 * math.expm1(float(extra.mean())):+.3f}% ± {100 * doubt:.3f}%",
                f"{exact.nbytes:,}",
                f"{rounded.nbytes:,}",
                f"{rounded.nbytes / exact.nbytes:.3f}",
            ]
        )
    return rows


def validation_windows(data: TokenDataset, length: int, count: int) -> Tensor:
    """(count, length + 1)，均匀铺开。"""
    starts = np.linspace(0, data.n_tokens - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([data.read(int(at), length + 1) for at in starts])).long()


@torch.inference_mode()
def score(model: GPT2Model, ids: Tensor, chunk: int, kv_dtype: KVDtype) -> Scores:
    """ids (B, T+1) 分块喂过缓存。"""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    cache = model.new_cache(len(ids), inputs.shape[1], kv_dtype=kv_dtype)
    parts = [
        model(inputs[:, at : at + chunk], cache=cache, use_cache=True)["logits"]
        for at in range(0, inputs.shape[1], chunk)
    ]
    logits = torch.cat(parts, 1)
    nll = F.cross_entropy(logits.double().transpose(1, 2), targets, reduction="none").mean(1)
    return Scores(logits, nll, cache.nbytes)


def error(a: Scores, b: Scores) -> float:
    return float((a.logits - b.logits).norm() / b.logits.norm())


def speed(held: int, steps: int, rounds: int) -> str:
    """解码的速度只看形状，不看权重：GPT-2 Small，已存 held 个键。"""
    model = create_gpt2_small(position="rope", context_size=held + steps).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, held))
    filled: dict[KVDtype, KVCache] = {}
    for kv_dtype in (None, "int8"):
        filled[kv_dtype] = model.new_cache(1, held + steps, max_chunk=held, kv_dtype=kv_dtype)
        with torch.inference_mode():
            model(ids, cache=filled[kv_dtype], use_cache=True, logits_to_keep=1)

    def job(kv_dtype: KVDtype) -> Callable[[], None]:
        @torch.inference_mode()
        def decode() -> None:
            cache = filled[kv_dtype]
            cache.truncate(held)
            for _ in range(steps):
                model(ids[:, :1], cache=cache, use_cache=True)

        return decode

    seconds = interleaved({"float32": job(None), "int8": job("int8")}, rounds)
    rows: list[list[object]] = [[name, f"{steps / value:.1f}"] for name, value in seconds.items()]
    return (
        f"Decoding one row of GPT-2 Small's shape with RoPE and {held} keys held, medians of "
        f"{rounds} interleaved rounds of {steps} tokens; the machine was not idle, so only the "
        f"ratio of {seconds['float32'] / seconds['int8']:.2f}x means something, and roughly:\n\n"
        + table(["cache", "tokens/s"], rows)
    )


if __name__ == "__main__":
    main()

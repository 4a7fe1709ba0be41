"""稀疏注意力与完全因果、与两个同类比：时间、内存，随长度的曲线（B=1、12 头、头宽 64、float32）。

    pip install -c constraints.txt -e ".[hf]" local-attention
    cd backend && python -m benchmarks.sparse_attention            # 表，几分钟
    cd backend && python -m benchmarks.sparse_attention --curve    # 曲线到 65,536，一刻钟

同一进程里交替计时取中位数；内存是新进程里一次前向使驻留内存的峰值涨了多少。
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.transformer.backends.attend import attend
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.visibility.pattern_text import parse
from app.models.transformer.visibility.positions import Positions

from .common import RESULTS, interleaved, table, write_result

HEADS, WIDTH, WINDOW = 12, 64, 256
FULL = "full causal (SDPA)"
PEERS = ("transformers Mistral, sliding_window=256 (SDPA)", "local-attention, window 256")
PATTERNS = (
    "local(256)",
    "local(256) | global(16)",
    "longformer(256, 16)",
    "sinks(4, 256)",
    "strided(128)",
    "local(128) | strided(128)",
    "fixed(128, 8)",
)
IMAGE = Path(__file__).parents[2] / "docs" / "images" / "sparse-attention.png"
# transformers 的掩码是 T×T 的，SDPA 还要把它变成浮点：再长就要几十 GB。
_DENSE_LIMIT = 16_384
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curve", action="store_true", help="draw time and memory up to 65,536")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "T"), help="internal: print one peak")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak_of(args.peak[0], int(args.peak[1]))))
        return
    command = "cd backend && python -m benchmarks.sparse_attention"
    if args.curve:
        write_result("sparse_curve", command + " --curve", curve(args.rounds))
        return
    timed = [timing(4096, args.rounds), timing(16_384, args.rounds)]
    write_result("sparse_attention", command, "\n\n".join([*timed, memory(16_384)]))


def present() -> tuple[str, ...]:
    """装了的同类；没装的说一声，不比。"""
    needs = dict(zip(PEERS, ("transformers", "local_attention"), strict=True))
    for name in PEERS:
        if importlib.util.find_spec(needs[name]) is None:
            print(f"{needs[name]} is not installed: {name} is left out", file=sys.stderr)
    return tuple(name for name in PEERS if importlib.util.find_spec(needs[name]) is not None)


def job(name: str, length: int) -> Run:
    """一种做法；掩码、分块都事先备好：在模型里它们每次前向只做一次，各层共用。"""
    if name == FULL:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if name == PEERS[0]:
        return mistral(length)
    if name == PEERS[1]:
        return local_attention()
    where = Positions.plain(0, length, torch.device("cpu"))
    plan = MaskPlan.build(where, where, parse(name), dtype=torch.float32, head_dim=WIDTH)
    return lambda q, k, v: attend(q, k, v, plan, dropout=0.0)


def mistral(length: int) -> Run:
    from transformers import MistralConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = MistralConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        sliding_window=WINDOW, attn_implementation="sdpa",  # type: ignore[call-arg]
    )  # fmt: skip
    mask = create_sliding_window_causal_mask(
        config, torch.empty(1, length, 1), None, None, torch.arange(length)[None]
    )

    class Module(torch.nn.Module):
        num_key_value_groups, is_causal = 1, True

    module = Module()
    return lambda q, k, v: sdpa_attention_forward(module, q, k, v, mask)[0].transpose(1, 2)


def local_attention() -> Run:
    from local_attention import LocalAttention

    run = LocalAttention(
        window_size=WINDOW, causal=True, look_backward=1, autopad=True,
        exact_windowsize=True, use_rotary_pos_emb=False,
    )  # fmt: skip
    return lambda q, k, v: run(q, k, v)


def inputs(length: int, grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, requires_grad=grad) for _ in range(3)]


def forward(run: Run, qkv: list[Tensor]) -> Callable[[], object]:
    def go() -> None:
        with torch.no_grad():
            run(*qkv)

    return go


def both(run: Run, qkv: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(*qkv), qkv, dy)


def check(jobs: dict[str, Run]) -> None:
    """计时之前先确认同类算的是同一件事；local-attention 的窗口多看一个键。"""
    qkv = inputs(1024, False)
    for name, text in ((PEERS[0], "local(256)"), (PEERS[1], "local(257)")):
        if name in jobs:
            ours, theirs = job(text, 1024)(*qkv), job(name, 1024)(*qkv)
            assert (ours - theirs).abs().max() < 1e-5, name


def timing(length: int, rounds: int) -> str:
    """同类慢得多，另与完全因果交替一轮，免得拖长主要的比较。"""
    qkv = inputs(length, True)
    dy = torch.randn(1, HEADS, length, WIDTH)
    rows: list[list[object]] = []
    for names, times in (((FULL, *PATTERNS), rounds), ((FULL, *present()), 1)):
        jobs = {name: job(name, length) for name in names}
        check(jobs)
        once = interleaved({n: forward(run, qkv) for n, run in jobs.items()}, times)
        twice = interleaved({n: both(run, qkv, dy) for n, run in jobs.items()}, times)
        rows += [
            [
                f"`{name}`" if name in PATTERNS else name,
                f"{once[name] * 1e3:.0f}",
                f"{once[FULL] / once[name]:.1f}x",
                f"{twice[name] * 1e3:.0f}",
                f"{twice[FULL] / twice[name]:.1f}x",
            ]
            for name in names
        ]
    head = [
        f"T = {length:,}",
        "forward, ms",
        "faster than full",
        "forward + backward, ms",
        "faster",
    ]
    return table(head, rows)


def peak_of(name: str, length: int) -> float:
    """一次前向的峰值，以 q、k、v 与输出这一组的大小为单位；组本身也在内。"""

    def resident(field: str) -> int:
        # 不用 ru_maxrss：它把父进程 exec 之前的峰值也算进来。
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024

    def once(tokens: int) -> Any:
        qkv = [torch.ones(1, HEADS, tokens, WIDTH) for _ in range(3)]
        with torch.no_grad():
            return job(name, tokens)(*qkv), qkv

    once(512)
    before = resident("VmRSS")
    kept = once(length)
    del kept
    return (resident("VmHWM") - before) / (4 * HEADS * length * WIDTH * 4)


def peak(name: str, length: int) -> float:
    """峰值只增不减，所以每次都另起进程。"""
    command = [sys.executable, "-m", "benchmarks.sparse_attention", "--peak", name, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def memory(length: int) -> str:
    rows: list[list[object]] = [
        [f"`{name}`" if name in PATTERNS else name, f"{peak(name, length):.2f}"]
        for name in (FULL, *PATTERNS, *present())
    ]
    return table([f"T = {length:,}, forward", "peak memory (q, k, v and output = 1)"], rows)


def curve(rounds: int) -> str:
    lengths = [512 * 2**i for i in range(8)]
    names = (FULL, *PATTERNS, *present())
    seconds: dict[str, dict[int, float]] = {name: {} for name in names}
    bytes_: dict[str, dict[int, float]] = {name: {} for name in names}
    for length in lengths:
        able = [n for n in names if n != PEERS[0] or length <= _DENSE_LIMIT]
        qkv = inputs(length, False)
        jobs = {name: forward(job(name, length), qkv) for name in able}
        times = rounds if length <= 8192 else 2 if length <= 16_384 else 1
        for name, value in interleaved(jobs, times).items():
            seconds[name][length] = value
            bytes_[name][length] = peak(name, length) * 4 * HEADS * length * WIDTH * 4
    draw(lengths, seconds, bytes_)
    rows: list[list[object]] = [
        [
            f"`{name}`",
            *(f"{seconds[name][n] * 1e3:.1f}" if n in seconds[name] else "-" for n in lengths),
        ]
        for name in names
    ]
    return table(["forward, ms, at T =", *(f"{n:,}" for n in lengths)], rows)


def draw(
    lengths: list[int], seconds: dict[str, dict[int, float]], bytes_: dict[str, dict[int, float]]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, data, label in (
        (left, seconds, "forward, seconds"),
        (right, {n: {t: b / 2**20 for t, b in d.items()} for n, d in bytes_.items()}, "peak, MiB"),
    ):
        for i, (name, points) in enumerate(data.items()):
            dashed = name in PEERS
            color = "black" if name == FULL else f"C{i - 1}"
            style = {"color": color, "linestyle": "--" if dashed else "-", "marker": "o"}
            axes.plot(list(points), list(points.values()), label=name, markersize=3, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("Attention, forward: batch 1, 12 heads of 64, float32, CPU")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=120)
    assert RESULTS.is_dir()


if __name__ == "__main__":
    main()

"""README 的锚点数字，一台机器上一次量完：现有的基准各在自己的子进程里，各有时限（慢的机器也够），
做完一个印一个。

cd backend && python -m benchmarks.all --quick --text tinyshakespeare.txt --nanogpt ../../nanoGPT

表写进 results/all-<avx2|avx512>.md；各基准自己的 results/NAME.md 不动，由 GPT2_RESULTS 引到别处。
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .common import RESULTS, hardware, table

PEERS = ("transformers", "onnxruntime", "ctranslate2", "llama_cpp", "local_attention")
LIBRARIES = ("torch", "transformers", "onnxruntime", "ctranslate2", "llama_cpp_python")


@dataclass(frozen=True)
class Part:
    """一个基准：名字、模块与完整的选项、快的时候换成的选项、时限（秒）、少了什么就不跑。

    words 里的 {text} 换成命令行给的，{folder} 换成放结果的临时文件夹。
    """

    name: str
    module: str
    words: tuple[str, ...]
    quick: tuple[str, ...]
    seconds: float
    needs: str = ""


ONE = ("--rounds", "1")
# docs 里的图由 deep_norms 自己画，这里不动它。
DRAWN = ("--plot", "{folder}/deep.png")
PARTS = (
    # 一步有七八秒，机器快慢在其间变：快的时候也走三步，一步一个数会连次序都错。
    Part("train 1x1024", "train_step", ("1x1024",), ("1x1024",), 480),
    Part("train 4x256", "train_step", ("4x256",), ("4x256",), 480),
    Part("head and loss", "head_loss", (), (), 180),
    Part("decode", "decode", (), (*ONE, "--new", "64"), 240, "transformers"),
    Part("int8 decode", "quant_decode", (), (*ONE, "--new", "32"), 360),
    Part("window 256 decode", "window_decode", (), (*ONE, "--batches", "1"), 240),
    Part("sparse attention", "sparse_attention", (), ONE, 360),
    Part("deep norms", "deep_norms", ("{text}", *DRAWN),
         ("{text}", *DRAWN, "--norms", "keel", "post", "--seeds", "0"), 240, "{text}"),
    Part("shakespeare", "shakespeare", ("{text}",), ("{text}", "--recipes", "shakespeare-char"),
         240, "{text}"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """一个基准怎样了：measured、skipped（why 说缺什么）、failed（why 是最后一行）。"""

    part: Part
    kind: str
    why: str
    seconds: float
    body: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.all", description="README's figures"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, at most the limits below")
    parser.add_argument("--only", nargs="+", default=[], help="these parts alone, by name")
    parser.add_argument("--text", default="", help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt", default="", help="a clone of nanoGPT to be measured beside")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    parts = chosen(args.only)
    print(f"{hardware()}, {', '.join(instructions())}", flush=True)
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            print(f"skipped  {name} is not installed: its rows are left out", flush=True)
    outcomes = []
    for part in parts:
        outcome = measure(part, args)
        outcomes.append(outcome)
        print(f"{outcome.kind:8} {part.name}, {outcome.seconds:.0f} s {outcome.why}", flush=True)
        print(outcome.body, flush=True)
    path = write(args.out, outcomes, shown(args))
    print(f"wrote {path}")
    return 1 if any(one.kind == "failed" for one in outcomes) else 0


def shown(args: argparse.Namespace) -> str:
    """表里的那一行：给了什么就写什么，文件的地方换成 README 里的。"""
    only = " ".join(f'"{name}"' for name in args.only)
    parts = {
        "--quick": args.quick, f"--only {only}": args.only,
        "--text tinyshakespeare.txt": args.text, "--nanogpt ../../nanoGPT": args.nanogpt,
    }  # fmt: skip
    return " ".join(word for word, given in parts.items() if given)


def chosen(names: Sequence[str]) -> list[Part]:
    """
    Raises:
        ValueError: 没有这个基准。
    """
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"only={unknown[0]!r} is not one of {', '.join(known)}")
    return [known[name] for name in names] if names else list(PARTS)


def measure(part: Part, args: argparse.Namespace) -> Outcome:
    """跑一个，限时；超时连同它起的子进程一起结束。"""
    given = {"text": str(Path(args.text).resolve()) if args.text else "", "nanogpt": args.nanogpt}
    if missing := lacking(part, given):
        return Outcome(part, "skipped", missing, 0.0)
    words = list(part.quick if args.quick else part.words)
    # nanoGPT 的两千步自己就要几分钟：快的时候只比一步。
    beside = ("train_step",) if args.quick else ("train_step", "shakespeare")
    if args.nanogpt and part.module in beside:
        words += ["--nanogpt", args.nanogpt]
    start, limit = time.monotonic(), part.seconds if args.quick else 10 * part.seconds
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command(part, [word.format(**given, folder=folder) for word in words]),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, "GPT2_RESULTS": folder},
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return Outcome(part, "failed", f"not done in {limit:.0f} s", time.monotonic() - start)
        took = time.monotonic() - start
        found = sorted(Path(folder).glob("*.md"))
        if process.returncode or not found:
            last = (said.strip().splitlines() or ["nothing printed"])[-1]
            return Outcome(part, "failed", f"exit {process.returncode}: {last}", took)
        # 标题、日期与命令各基准自己写过一遍：这里只留命令之后的。
        bodies = [path.read_text("utf-8").split("```\n", 1)[1].strip() for path in found]
        return Outcome(part, "measured", "", took, "\n\n".join(bodies))


def command(part: Part, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{part.module}", *words]


def lacking(part: Part, given: dict[str, str]) -> str:
    if part.needs == "{text}":
        return "" if given["text"] else "give --text tinyshakespeare.txt"
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return f"{part.needs} is not installed"
    return ""


def instructions() -> list[str]:
    """这一次用得上的指令集，宽的一族在前；内核自己的开关（GPT2_NATIVE 等）另说。"""
    capability = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    extra = {"avx512_vnni": "VNNI", "avx512_bf16": "BF16", "amx_tile": "AMX"}
    wide = capability == "AVX512"
    return [capability, *(name for flag, name in extra.items() if wide and flag in flags)]


def versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def write(folder: Path, outcomes: Sequence[Outcome], flags: str) -> Path:
    name = "all-avx512" if instructions()[0] == "AVX512" else "all-avx2"
    rows = [[one.part.name, one.kind, f"{one.seconds:.0f}", one.why] for one in outcomes]
    parts = "\n\n".join(f"## {one.part.name}\n\n{one.body}" for one in outcomes if one.body)
    text = (
        f"# {name}\n\n{datetime.date.today().isoformat()}, {hardware()}, "
        f"{', '.join(instructions())}\n\n{versions()}\n\n"
        f"```bash\ncd backend && python -m benchmarks.all {flags}\n```\n\n"
        f"{table(['part', 'outcome', 'seconds', ''], rows)}\n\n{parts}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    raise SystemExit(main())

"""整条路的核对：训练、编译、续训、生成、缓存、量化、内存不够、几张卡。"""

from __future__ import annotations

import copy
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.generation import graph_step
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model
from app.training.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
from app.training.machine.recompute import checkpoint_blocks
from app.training.machine.runtime import choose_runtime, compile_blocks, memory_error
from app.training.run import Result, train
from app.training.saving.checkpoint import step_folder

from .log import Log, Skip, synchronize
from .models import gradients, ids, pair, shape, tiny

GREEDY = SamplingConfig(temperature=0.0)


def recompute(log: Log) -> None:
    """激活检查点：同样的梯度。"""
    found = []
    for layers in (range(0), range(0, 2, 1)):
        torch.manual_seed(0)
        model = GPT2Model(tiny(dropout=0.1)).to(log.device)
        checkpoint_blocks(model, layers)
        x = ids(2, 33, 211).to(log.device)
        torch.manual_seed(5)
        model(x[:, :-1], targets=x[:, 1:])["loss"].backward()
        found.append(gradients(model))
    log.agrees("gradients with dropout", found[1], found[0], 1e-6)


def compiled(log: Log) -> None:
    """逐块编译：各层共用一次，训练、验证、样文轮着来也不再编译；结果与不编译的相同。"""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    begin = _graphs(counters)
    model, exact = pair(tiny(n_layer=4), log.device)
    x = ids(2, 33, 211).to(log.device)

    def loss(one: GPT2Model) -> torch.Tensor:
        rows = x.to(one.device)
        return one(rows[:, :-1], targets=rows[:, 1:])["loss"]

    def cycle() -> None:
        for _ in range(2):
            loss(model.train()).backward()
        with torch.no_grad():
            loss(model.eval())
        with torch.compiler.set_stance("force_eager"):
            complete(model, [[1, 2, 3]], Options(max_new_tokens=3, sampling=GREEDY))

    said = compile_blocks(model, "on", log.device, lambda: loss(model).backward(), print)
    log.holds("compiles", said.startswith("on"), said, "on: ...")
    log.holds("graphs of 4 layers", (n := _graphs(counters) - begin) <= 3, str(n), "<= 3")
    cycle()
    once = _graphs(counters)
    cycle()
    log.equal("new graphs in a second round of train, eval, sample", _graphs(counters) - once, 0)
    model.zero_grad()
    loss(model.train()).backward()
    loss(exact.train()).backward()
    log.agrees("gradients", gradients(model), gradients(exact), 2e-4)


def _graphs(counters: Any) -> int:
    return int(counters["stats"]["unique_graphs"])


def memory(log: Log) -> None:
    """内存不够时说清尺寸与改法。"""
    config = TrainConfig(model=tiny())
    try:
        with memory_error(config, 8):
            torch.empty(1 << 47, device=log.device)
        said = "nothing was raised"
    except MemoryError as error:
        said = str(error)
    log.holds("out of memory", "--micro-batch 4" in said, said[:80], "names --micro-batch 4")


def syncs(log: Log) -> None:
    """一步训练、一步解码各等设备几次：torch 自己数。"""
    if log.device.type != "cuda":
        raise Skip("there is no queue to wait for on a CPU; tests/syncs.py counts there")
    with tempfile.TemporaryDirectory() as folder:
        counts = _training_waits(log, Path(folder))
    log.holds("waits in a training step", max(counts) <= 1, str(counts), "<= 1")
    model = GPT2Model(tiny(context_size=96)).to(log.device).eval()
    for name, sampling in (("greedy", GREEDY), ("top-k", SamplingConfig(top_k=20))):
        complete(model, [[1, 2]], Options(max_new_tokens=40, sampling=sampling), seeds=[0])
        found = []
        for new in (40, 60):
            options = Options(max_new_tokens=new, sampling=sampling)
            found.append(_waits(lambda o=options: complete(model, [[1, 2]], o, seeds=[0])))
        each = (found[1] - found[0]) / 20
        log.holds(f"waits in a decoding step, {name}", each <= 1, f"{each:g}", "<= 1")


def _training_waits(log: Log, folder: Path) -> list[int]:
    from app.training.trainer import Trainer

    plain, counts = Trainer._train_step, list[int]()
    Trainer._train_step = lambda self: counts.append(_waits(lambda: plain(self)))  # type: ignore[method-assign]
    try:
        _train(_config(log, folder, steps=6))
    finally:
        Trainer._train_step = plain  # type: ignore[method-assign]
    return counts[2:]


def _waits(job: Callable[[], object]) -> int:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in said)


def generate(log: Log) -> None:
    """贪心的续写与 CPU 上的 float32 逐个相同；显卡上走的是录下来的一步。"""
    prompts = [[1, 2, 3], list(range(20)), [7] * 11]
    new = log.pick(64, 20)
    cases: dict[str, tuple[dict[str, Any], list[list[int]], dict[str, Any]]] = {
        "one row": ({}, prompts[:1], {}),
        "equal rows": ({"position": "rope"}, [prompts[1], prompts[1][::-1]], {}),
        "rows of three lengths": ({}, prompts, {}),
        "ring": ({"attention_pattern": "local(9)", "position": "rope"}, prompts[:1], {}),
        "int8 keys": ({}, prompts[:1], {"kv_dtype": "int8"}),
        "sliding": ({"context_size": 32}, prompts[:1], {"overflow": "slide"}),
        "experts": ({"moe_num_experts": 4}, prompts[:1], {}),
    }
    for name, (changes, rows, options) in cases.items():
        torch.manual_seed(0)
        model = GPT2Model(shape(**changes)).eval()
        mine = copy.deepcopy(model).to(log.device)
        asked = Options(max_new_tokens=new, sampling=GREEDY, **options)
        with warnings.catch_warnings():
            # 录不成、对不上都会警告：在这里就是错。
            warnings.filterwarnings("error", message=".*decoding takes the forward")
            found = [done.tokens for done in complete(mine, rows, asked)]
        wanted = [done.tokens for done in complete(model, rows, asked)]
        same = [
            sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(a, b, strict=True)))
            for a, b in zip(found, wanted, strict=True)
        ]
        log.equal(f"{name}: equal tokens", same, [new] * len(rows))
        if log.device.type == "cuda" and name == "one row":
            used = graph_step._agrees.get(mine)
            log.holds("the recorded step is used", bool(used), str(used), "True")
            log.figure("CUDA graphs", graph_step.choose_graph(mine, new)[1])


def caches(log: Log) -> None:
    """逐个词元喂缓存与整段前向相同；int8 的键值在界内。"""
    for name, changes, options, limit in (
        ("ring", {"attention_pattern": "sinks(2, 9)", "position": "rope"}, {}, 1e-4),
        ("whole", {}, {"ring": False}, 1e-4),
        ("int8", {}, {"kv_dtype": "int8"}, 5e-2),
    ):
        model, exact = pair(shape(**changes), log.device)
        rows = ids(2, 60, 211)
        cache = model.eval().new_cache(2, **options)
        found = []
        with torch.no_grad():
            for part in rows.to(log.device).split(1, 1):
                found.append(model(part, cache=cache, use_cache=True)["logits"])
            wanted = exact.eval()(rows)["logits"]
        log.agrees(f"{name}: logits of 60 steps", torch.cat(found, 1), wanted, limit)


def quantized(log: Log) -> None:
    """量化的矩阵在设备上与还原成浮点的孪生相同。"""
    from app.quantization.codes import Scheme
    from app.quantization.model import QuantizedModel, dequantize, matrices
    from app.quantization.rtn import round_to_nearest

    torch.manual_seed(0)
    model, rows = GPT2Model(shape()).eval(), ids(2, 40, 211)
    for name, scheme in {"int8": Scheme(8), "int4": Scheme(4, 32)}.items():
        codes = {
            key: round_to_nearest(model.get_parameter(key), scheme)
            for key in matrices(model.config)
        }
        small = QuantizedModel.of(model, codes, name)
        wanted = dequantize(small).double()(rows)["logits"]
        with torch.no_grad():
            found = small.to(log.device)(rows.to(log.device))["logits"]
        log.agrees(f"{name}: logits", found, wanted, 1e-3 if log.device.type == "cpu" else 2e-5)


def resume(log: Log) -> None:
    """一气走完与中途续上逐位相同；设备上存的在 CPU 上接着训，再回来。"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(log, folder, steps=8, save_every=4)
        try:
            with _deterministic():
                whole = _train(replace(config, out=str(folder / "whole")))
                half = str(step_folder(folder / "whole", 4))
                again = _train(replace(config, out=str(folder / "again"), resume=half))
            log.equal("bits after a resume", _differing(whole, again), [])
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            log.holds("deterministic algorithms", False, str(error).split(".")[0], "all known")
            return
        plain = [_train(replace(config, out=str(folder / f"plain{i}"))) for i in (0, 1)]
        differing = _differing(*plain)
        log.figure("not deterministic without asking", ", ".join(differing) or "nothing")
        _over_and_back(log, folder, config)


def _over_and_back(log: Log, folder: Path, config: TrainConfig) -> None:
    """没有 dropout：两个设备的随机数不同，损失却该相同。"""
    still = replace(config, model=tiny(vocab_size=32), optim=OptimConfig(lr=1e-3))
    here = _train(replace(still, out=str(folder / "here"), steps=12))
    half = str(step_folder(folder / "here", 4))
    there = _train(replace(still, out=str(folder / "there"), resume=half, device="cpu", steps=12))
    middle = str(step_folder(folder / "there", 8))
    back = _train(replace(still, out=str(folder / "back"), resume=middle, steps=12))
    wanted = _last_loss(here)
    for what, run in (("resumed on the CPU", there), ("and back on the device", back)):
        log.agrees(f"{what}: loss of step {run.step}", _last_loss(run), wanted, 1e-3)


def _last_loss(result: Result) -> torch.Tensor:
    lines = (result.checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return torch.tensor(rows[-1]["loss"])


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _config(log: Log, folder: Path, **changes: Any) -> TrainConfig:
    words = random.Random(0).choices(["the ", "cat ", "sat ", "on a ", "mat.\n"], k=2000)
    (folder / "text.txt").write_text("".join(words))
    if not (folder / "data").exists():
        sources = Sources((folder / "text.txt",))
        prepare(sources, folder / "data", TokenizerSpec("chars"), say=lambda line: None)
    values: dict[str, Any] = {
        "model": tiny(vocab_size=32, dropout=0.1),
        "data": DataConfig(folder=str(folder / "data")),
        "optim": OptimConfig(lr=1e-3, name="muon"),
        "schedule": ScheduleConfig(warmup_steps=2),
        "out": str(folder / "run"), "batch_size": 8, "micro_batch": 4, "precision": "float32",
        "compile": "off", "eval_every": 0, "eval_batches": 1, "sample_tokens": 0,
        "save_every": 0, "keep_last": 9, "device": str(log.device),
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def _train(config: TrainConfig) -> Result:
    # 进度条不是这里要看的。
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return train(config, lambda decisions: None, lambda line: None)


def _weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def _differing(one: Result, other: Result) -> list[str]:
    a, b = _weights(one), _weights(other)
    return [name for name in a if not torch.equal(a[name], b[name])]


def ranks(log: Log) -> None:
    """几张卡：`gpt2 verify --ranks N` 经 NCCL，须与一个进程相同。"""
    found = torch.cuda.device_count() if log.device.type == "cuda" else 0
    if found < 2:
        raise Skip(f"{found} GPUs here, 2 are needed")
    for way in ((), ("--parallel.shard", str(found))):
        command = [sys.executable, "-m", "app.cli", "verify", "--device", "cuda"]
        command += ["--ranks", str(found), *way]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(30, log.left))
        last = (done.stdout.strip() or done.stderr.strip()).split("\n")[-1]
        what = " ".join(("verify", "--ranks", str(found), *way))
        log.holds(what, done.returncode == 0, last[:90], "exit code 0")
    synchronize(log.device)


def decisions(log: Log) -> None:
    """训练开始时说的：设备、精度、编译、float32 的乘法。"""
    runtime = choose_runtime(TrainConfig(model=tiny(), device=str(log.device)))
    log.figure("device", f"{runtime.device}: {runtime.device_why}")
    log.figure("precision", f"{runtime.dtype}: {runtime.dtype_why}")
    log.figure("float32 products", ": ".join(runtime.products or ("not a GPU", "untouched")))

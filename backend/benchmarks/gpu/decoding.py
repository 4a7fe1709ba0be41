"""逐词元解码的数字：逐核启动、CUDA 图、transformers 与带宽的下限；交出去的模型。"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.generation.graph_step import choose_graph
from app.interop.export import export
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.factory import PRESETS

from .card import read_bandwidth
from .log import Log, synchronize
from .models import ids, tiny

GREEDY = SamplingConfig(temperature=0.0)
CHOICE = "app.generation.context.choose_graph"


def decode(log: Log) -> None:
    """Small、bfloat16、贪心；提示 128 个词元，再写 128 个。"""
    shape = tiny() if log.toy else GPT2Config(vocab_size=50304, norm="pre", **PRESETS["small"])
    dtype = log.pick(torch.bfloat16, torch.float32)
    torch.manual_seed(0)
    model = GPT2Model(shape).to(log.device, dtype).eval()
    new, prompt = log.pick(128, 8), log.pick(128, 8)
    weights = sum(p.nbytes for p in model.parameters())
    floor = read_bandwidth(log.device) / weights
    log.figure("bandwidth floor, one row", f"{floor:,.0f} tokens/s")
    theirs = _transformers(log, shape, dtype)
    for rows in log.pick((1, 8, 64), (1, 2)):
        prompts = ids(rows, prompt, shape.vocab_size).tolist()
        found: dict[str, float] = {}
        with mock.patch(CHOICE, lambda model, tokens: (False, "eager")):
            found["eager"] = _speed(log, rows, new, lambda n, p=prompts: _ours(model, p, n))
        used, why = choose_graph(model, new)
        if used:
            found["CUDA graphs"] = _speed(log, rows, new, lambda n, p=prompts: _ours(model, p, n))
        else:
            log.skip(f"{rows} rows: CUDA graphs", why)
        if theirs is not None:
            found["transformers"] = _speed(log, rows, new, lambda n, p=prompts: theirs(p, n))
        for name, speed in found.items():
            part = f", {speed / floor:.0%} of the floor" if rows == 1 else ""
            log.figure(f"{rows} rows: {name}", f"{speed:,.0f} tokens/s{part}")
        if theirs is not None and rows == 1:
            best = max(speed for name, speed in found.items() if name != "transformers")
            log.goal("one row beside transformers", best / found["transformers"], "x", least=2.0)


def _ours(model: GPT2Model, prompts: list[list[int]], new: int) -> object:
    return complete(model, prompts, Options(max_new_tokens=new, sampling=GREEDY))


def _speed(log: Log, rows: int, new: int, run: Callable[[int], object]) -> float:
    """提示的时间减掉：写 new 个与写 1 个之差。"""

    def took(count: int) -> float:
        times = []
        for _ in range(log.pick(2, 1)):
            synchronize(log.device)
            start = time.perf_counter()
            run(count)
            synchronize(log.device)
            times.append(time.perf_counter() - start)
        return min(times)

    run(new)
    return rows * (new - 1) / max(1e-9, took(new) - took(1))


def _transformers(
    log: Log, shape: GPT2Config, dtype: torch.dtype
) -> Callable[[list[list[int]], int], object] | None:
    if importlib.util.find_spec("transformers") is None:
        log.skip("beside transformers", "it is not installed")
        return None
    from transformers import GPT2Config as Config
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(
        Config(
            vocab_size=shape.vocab_size, n_positions=shape.context_size, n_layer=shape.n_layer,
            n_head=shape.n_head, n_embd=shape.n_embed, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )
    ).to(log.device, dtype).eval()  # fmt: skip

    def run(prompts: list[list[int]], new: int) -> object:
        x = torch.tensor(prompts, device=log.device)
        mask = torch.ones_like(x)
        return model.generate(
            x, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new
        )

    return run


def interop(log: Log) -> None:
    """在设备上训练过的模型交出去：torch.export，与装了的各格式。"""
    torch.manual_seed(0)
    model = GPT2Model(tiny(tie_weights=True)).to(log.device).eval()
    x = ids(2, 12, model.config.vocab_size).to(log.device)
    with torch.no_grad():
        wanted = model(x)["logits"]
        program = torch.export.export(_Logits(model), (x,), strict=False)
        log.agrees("torch.export", program.module()(x), wanted, 1e-5)
    for target, needs in (("hf", "transformers"), ("gguf", "gguf"), ("onnx", "onnxruntime")):
        if importlib.util.find_spec(needs) is None:
            log.skip(f"export --to {target}", f"{needs} is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = export(model, None, target, Path(folder) / target)
        same = not isinstance(done.checked, str) and done.checked.same
        log.holds(f"export --to {target}", same, str(done.checked)[:90], "the same")
        model.to(log.device)


class _Logits(torch.nn.Module):
    def __init__(self, model: GPT2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)["logits"]

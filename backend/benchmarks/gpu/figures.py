"""训练与注意力的数字：词元每秒、MFU、峰值内存；稀疏与全部；专家与稠密。

B 行、T 词元数。
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.backends.attend import attend
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.experts.moe import MoE
from app.models.transformer.factory import PRESETS
from app.models.transformer.layers.context import Context, Note
from app.models.transformer.layers.loss import (
    Chunk,
    cross_entropy,
    cross_entropy_fused,
    head_cross_entropy,
)
from app.models.transformer.mlp import MLP
from app.models.transformer.visibility.pattern_text import parse
from app.models.transformer.visibility.positions import Positions
from app.planning.fit import training_footprint
from app.planning.flops import flops_per_token
from app.planning.tuned import ALONE
from app.training.config import OptimConfig, TrainConfig
from app.training.machine.runtime import choose_runtime, compile_blocks
from app.training.optim.build import build_optimizer
from app.training.step import clip_gradients, gradient_norm

from .card import peak_flops
from .log import Log, Skip, seconds, synchronize
from .models import ids, tiny

SPARSE = ("local(512)", "local(256) | global(16)", "sinks(4, 1020)", "strided(64)")


def train_small(log: Log) -> None:
    _training(log, "small", goal=0.5)


def train_medium(log: Log) -> None:
    _training(log, "medium", goal=0.5)


def train_muon(log: Log) -> None:
    """Muon 的一步比 AdamW 多几成。"""
    times = {name: _one(log, "small", name, "on")[0] for name in ("adamw", "muon")}
    more = times["muon"] / times["adamw"] - 1
    log.figure("a step with Muon instead of AdamW", f"{more:+.1%}")


def _training(log: Log, size: str, goal: float) -> None:
    shown = size if not log.toy else "toy"
    for compiling in ("off", "on") if not log.toy else ("off",):
        step, config, peak = _one(log, size, "adamw", compiling)
        speed = config.tokens_per_step / step
        batch = f"{config.batch_size} x {config.model.context_size}"
        how = "compiled" if compiling == "on" else "eager"
        log.figure(f"{shown}, {how}, {batch}", f"{speed:,.0f} tokens/s")
        flops, known = peak_flops(log.device)
        used = flops_per_token(config.model).total * speed / flops
        if compiling == "on":
            log.goal(f"{shown}, {how}: MFU of {known}", used, "", least=goal)
        else:
            log.figure(f"{shown}, {how}: MFU of {known}", f"{used:.3f}")
        if peak:
            planned = training_footprint(config, choose_runtime(config), ALONE).peak
            sizes = f"{peak / 2**30:.2f} GiB of the {planned / 2**30:.2f} planned"
            log.near(f"{shown}, {how}: peak {sizes}", peak / planned, within=0.15)


def _one(log: Log, size: str, optim: str, compiling: str) -> tuple[float, TrainConfig, int]:
    """(一步的秒数, 设置, 峰值内存)。"""
    rows = log.pick(32 if size == "small" else 16, 2)
    shape = tiny() if log.toy else GPT2Config(
        vocab_size=50304, norm="pre", dropout=0.0, context_size=1024, **PRESETS[size]
    )  # fmt: skip
    config = TrainConfig(
        model=shape, batch_size=rows, device=str(log.device), optim=OptimConfig(name=optim),
        precision="float32" if log.toy else "bfloat16", compile=compiling,
    )  # fmt: skip
    config = _fitting(config)
    _clear(log.device)
    runtime = choose_runtime(config)
    torch.manual_seed(0)
    model = GPT2Model(config.model).to(log.device)
    optimizer, _ = build_optimizer(model, config.optim)
    x = ids(config.batch_size, shape.context_size + 1, shape.vocab_size).to(log.device)
    parameters = list(model.parameters())

    def gradients() -> None:
        with runtime.autocast():
            loss = model(x[:, :-1], targets=x[:, 1:])["loss"]
        loss.backward()

    def step() -> None:
        gradients()
        norm = gradient_norm(parameters)
        clip_gradients(parameters, norm, float(norm), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    said = compile_blocks(model, compiling, log.device, gradients, print)
    optimizer.zero_grad(set_to_none=True)
    if compiling == "on" and not said.startswith("on"):
        raise RuntimeError(f"it did not compile: {said}")
    step()
    if log.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(log.device, step, log.pick(10, 2))
    peak = torch.cuda.max_memory_allocated() if log.device.type == "cuda" else 0
    return took, config, peak


def _fitting(config: TrainConfig) -> TrainConfig:
    """放不进这张卡的就减半。"""
    if not config.device.startswith("cuda"):
        return config
    room, runtime = 0.85 * torch.cuda.mem_get_info()[1], choose_runtime(config)
    while config.batch_size > 1 and training_footprint(config, runtime, ALONE).peak > room:
        config = config.replace(batch_size=config.batch_size // 2)
    return config


def nanogpt(log: Log) -> None:
    """同样的批、AdamW、bfloat16 与编译；clone 由运行的人给。"""
    if not log.nanogpt:
        raise Skip("give a clone with --nanogpt PATH")
    mine, config, _ = _one(log, "small", "adamw", log.pick("on", "off"))
    sys.path.insert(0, log.nanogpt)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape = config.model
    _clear(log.device)
    model = GPT(
        GPTConfig(
            vocab_size=shape.vocab_size, block_size=shape.context_size, dropout=0.0, bias=True,
            n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embed,
        )
    ).to(log.device)  # fmt: skip
    run = model if log.toy else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    x = ids(config.batch_size, shape.context_size + 1, shape.vocab_size).to(log.device)
    half = torch.autocast(log.device.type, torch.bfloat16)

    def step() -> None:
        with nullcontext() if log.toy else half:
            loss = run(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    theirs = seconds(log.device, step, log.pick(10, 2))
    log.goal("speed beside nanoGPT compiled", theirs / mine, "x", least=1.15)


def sparse(log: Log) -> None:
    """一层注意力的前向与反向：FlexAttention 的稀疏与 flash 的全部。"""
    if log.device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        raise Skip("this card has no bfloat16")
    dtype, heads = log.pick(torch.bfloat16, torch.float32), 12
    for length in log.pick((131072, 16384, 4096, 65536), (128,)):
        full = _attention_time(log, "causal", length, heads, dtype)
        log.figure(f"{length:,} tokens: full", f"{1e3 * full:.2f} ms")
        for text in SPARSE if not log.toy else ("local(16)",):
            if log.left < 20:
                log.skip(f"{length:,} tokens: {text} and longer", "the part's time is over")
                return
            torch._dynamo.reset()
            took = _attention_time(log, text, length, heads, dtype)
            log.figure(f"{length:,} tokens: {text}", f"{1e3 * took:.2f} ms, {full / took:.1f}x")


def _attention_time(log: Log, text: str, length: int, heads: int, dtype: torch.dtype) -> float:
    where, pattern = Positions.plain(0, length, log.device), parse(text)
    plan = MaskPlan.build(where, where, pattern, dtype=dtype, grad=True)
    q, k, v = (
        torch.randn(1, heads, length, 64, device=log.device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )

    def job() -> None:
        attend(q, k, v, plan, dropout=0.0).sum().backward()

    return seconds(log.device, job, 5)


def experts(log: Log) -> None:
    """8 个专家选 2，一个专家的宽是稠密的一半：每个词元的运算相同。"""
    width, tokens = log.pick(768, 32), log.pick(16384, 64)
    config = GPT2Config(
        n_embed=width, n_head=4, dropout=0.0, moe_num_experts=8, moe_top_k=2,
    )  # fmt: skip
    dtype = torch.bfloat16 if not log.toy else torch.float32
    moe = MoE(config).to(log.device)
    dense = MLP(config, 2 * config.expert_hidden).to(log.device)
    for p in [*moe.parameters(), *dense.parameters()]:
        nn.init.normal_(p, std=0.02)
    x = torch.randn(8, tokens // 8, width, device=log.device)
    where = Positions.plain(0, tokens // 8, log.device)
    ctx = Context(where, MaskPlan.build(where, where), Note())
    times: dict[str, float] = {}
    ways = {"dense": (dense, ()), "experts": (moe, (ctx,))}
    for how in log.pick(("eager", "compiled"), ("eager",)):
        for name, (module, rest) in ways.items():
            if how == "compiled":
                module.compile()

            def job(module: nn.Module = module, rest: tuple[Context, ...] = rest) -> None:
                with torch.autocast(log.device.type, dtype) if not log.toy else nullcontext():
                    y = module(x, *rest)
                y.float().sum().backward()

            times[name] = seconds(log.device, job, 7)
            what = f"{name}, {how}, {tokens:,} tokens forward and backward"
            log.figure(what, f"{1e3 * times[name]:.2f} ms")
        ratio = times["experts"] / times["dense"]
        log.figure(f"experts over dense of equal work, {how}", f"{ratio:.2f}x")


def head(log: Log) -> None:
    """输出头与损失：融合买到什么；补齐的词表与 GPT-2 本来的。"""
    for vocab in log.pick((50304, 50257), (211,)):
        _head(log, vocab, log.pick(16384, 64))


def _head(log: Log, vocab: int, tokens: int) -> None:
    weight = torch.randn(vocab, 768, device=log.device, requires_grad=True)
    hidden = torch.randn(1, tokens, 768, device=log.device, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens), device=log.device)
    chunks: dict[str, Chunk] = {"plain": cross_entropy}
    if not log.toy:
        fused = torch.compile(cross_entropy_fused)
        chunks["fused"] = lambda logits, labels, rows: fused(logits, labels)
    for name, chunk in chunks.items():

        def job(chunk: Callable[..., tuple[Tensor, Tensor]] = chunk) -> None:
            with torch.autocast(log.device.type, torch.bfloat16):
                head_cross_entropy(hidden, weight, labels, chunk).backward()

        log.figure(
            f"head and loss of {vocab:,} words, {name}",
            f"{1e3 * seconds(log.device, job, 5):.2f} ms",
        )

    def whole() -> None:
        with torch.autocast(log.device.type, torch.bfloat16):
            logits = F.linear(hidden, weight)
            F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()

    took = seconds(log.device, whole, 5)
    log.figure(f"head and loss of {vocab:,} words, all logits at once", f"{1e3 * took:.2f} ms")


def _clear(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()

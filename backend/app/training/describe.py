"""开训之前给人看的表：将要怎样跑，每一项的值与理由。"""

from __future__ import annotations

import os

import torch

from app.models.transformer.backends.choose import explain_backends
from app.models.transformer.experts.dispatch import explain_dispatch

from .config import TrainConfig
from .report.run_facts import Decisions
from .trainer import Trainer


def describe(trainer: Trainer, compiled: str) -> Decisions:
    """将要怎样跑，由已经组装好的看出。"""
    config, runtime = trainer.config, trainer.runtime
    shape = config.model
    passed = f"{config.passes} passes of {config.rows_at_once} sequences"
    if config.passes == 1:
        passed = "one pass"
    total = trainer.tokens + (config.steps - trainer.step) * config.tokens_per_step
    epochs = trainer.feed.epoch(config.steps)
    return [
        ("device", str(runtime.device), runtime.device_why),
        ("precision", str(runtime.dtype).removeprefix("torch."), runtime.dtype_why),
        *([] if runtime.products is None else [("float32 products", *runtime.products)]),
        ("compile", compiled.split(":")[0], compiled.partition(": ")[2]),
        *_recompute_line(config),
        *(
            ("attention", choice.backend, choice.reason)
            for choice in explain_backends(
                shape, device=runtime.device, dtype=runtime.dtype, training=True
            )
        ),
        *_experts(trainer),
        (
            "model",
            f"{trainer.engine.whole.parameters:,} parameters",
            f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embed}, "
            f"norm {shape.norm}, vocabulary {shape.vocab_size}",
        ),
        ("optimizer", trainer.optimizer_why, f"peak lr {config.optim.lr:g}"),
        (
            "step",
            f"{config.tokens_per_step:,} tokens",
            f"{config.batch_size} x {shape.context_size}, {passed}",
        ),
        (
            "run",
            f"{config.steps:,} steps",
            f"{total:,} tokens, {epochs:.2f} times the data in {config.data.folder}",
        ),
        *_objective_line(trainer),
        *_validation_line(trainer),
        *_ranks_line(trainer),
        ("threads", str(torch.get_num_threads()), f"of {os.cpu_count()} processors; {_waiting()}"),
    ]


def _objective_line(trainer: Trainer) -> Decisions:
    """只在不是"每个词元的下一个词元"时说。"""
    config, data = trainer.config, trainer.data
    objective = config.objective
    if objective.kind == "lm" and data.kind == "text":
        return []
    counted = "all tokens" if objective.score == "all" else "answers only"
    scored = f"{counted}, {data.n_scored:,} of {data.n_tokens:,} tokens scored"
    packed = "examples packed, isolated" if config.data.pack else "one example a row"
    how = {
        "lm": "",
        "distill": f"alpha {objective.alpha:g}, temperature {objective.temperature:g}, teacher "
        f"{objective.teacher}; ",
        "dpo": f"beta {objective.dpo_beta:g}, sft {objective.dpo_sft:g}, reference "
        f"{objective.reference}; first loss ln 2 = 0.693 while it equals the reference; ",
    }[objective.kind]
    rows = "" if data.kind == "text" else f"; {packed}"
    return [("objective", objective.kind, f"{how}{scored}{rows}")]


def _validation_line(trainer: Trainer) -> Decisions:
    if trainer.validation is None or not trainer.others:
        return []
    names = ", ".join(one.name for one in trainer.others)
    return [("validation", trainer.validation.name, f"decides best and patience; also {names}")]


def _ranks_line(trainer: Trainer) -> Decisions:
    engine = trainer.engine
    if engine.summing == "plain":
        return []
    found = ", ".join(f"{axis} {n}" for axis, n in engine.mesh.sizes.items() if n > 1)
    how = "all_reduce: bits change with the number of ranks"
    if engine.summing == "tree":
        how = "one fixed tree: the same bits for every number of ranks that divides it"
    return [("ranks", str(trainer.world.size), f"{found or 'alone'}; {how}")]


def _recompute_line(config: TrainConfig) -> Decisions:
    every = config.activation_checkpointing
    if every == 0:
        return []
    which = "every block" if every == 1 else f"every {every}th block from the first"
    return [("recompute", which, "activation checkpointing: less memory, same result, slower")]


def _experts(trainer: Trainer) -> Decisions:
    shape, runtime = trainer.config.model, trainer.runtime
    found = explain_dispatch(shape, device=runtime.device, dtype=runtime.dtype)
    if found is None:
        return []
    active = trainer.engine.whole.active
    of = f"{len(shape.moe_layers)} of {shape.n_layer} layers, {shape.moe.router}"
    return [
        ("dispatch", *found),
        (
            "experts",
            f"{shape.moe_num_experts}, top-{shape.moe_top_k}",
            f"{of}, width {shape.expert_hidden}; {active:,} parameters active per token",
        ),
    ]


def _waiting() -> str:
    policy = os.environ.get("OMP_WAIT_POLICY")
    return f"OMP_WAIT_POLICY={policy}" if policy else "OMP_WAIT_POLICY not set"

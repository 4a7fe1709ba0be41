"""并行的一切拒绝，在建任何进程组、写任何文件之前；每句话点名两个值与改法。

能跑、却悄悄算错的组合最坏，所以凡没有数值测试的组合都在这里拒绝。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from app.models.transformer.config import GPT2Config
from app.models.transformer.settings.fields import differing

from .comm import Ranks
from .config import ParallelConfig
from .mesh import AXES, DATA, degrees
from .ways.context import why_not_halo

# 各有一个测试的两两组合；别的都拒绝。
TESTED = {
    frozenset(pair)
    for pair in (
        ("replicate", "shard"),
        ("replicate", "tensor"),
        ("shard", "tensor"),
        ("shard", "context"),
        ("shard", "pipeline"),
        ("replicate", "context"),
        ("replicate", "pipeline"),
        ("replicate", "expert"),
        ("tensor", "context"),
        ("pipeline", "tensor"),
        ("pipeline", "context"),
        ("pipeline", "expert"),
    )
}
# 等多久、宽限多久不算"要并行"。
_WAITING = {"timeout_s", "grace_s"}
_FOLDED = ("zbv", "dualpipev")
_SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")


@dataclass(frozen=True)
class Job:
    """要分的是什么：训练配置里与并行有关的几项。"""

    parallel: ParallelConfig
    model: GPT2Config
    batch_size: int
    micro_batch: int | None = None
    sample_tokens: int = 0
    compile: str = "auto"
    device: str = "auto"
    optimizer: str = "adamw"
    objective: str = "lm"


def check_alone(parallel: ParallelConfig) -> None:
    """没有 torchrun 也没有 --ranks。

    Raises:
        ValueError: 却给了并行的设置。
    """
    given = [name for name in differing(parallel, ParallelConfig()) if name not in _WAITING]
    if given:
        values = ", ".join(f"parallel.{name}={_said(getattr(parallel, name))}" for name in given)
        raise ValueError(
            f"{values} but this is 1 process without ranks: use --ranks N or torchrun, or leave "
            f"{'it' if len(given) == 1 else 'them'} out"
        )


def check(job: Job, world: int) -> None:
    """
    Raises:
        ValueError: world 个 rank 做不了 job；点名两个值与改法。
    """
    sizes = degrees(job.parallel, world)
    for problem in (
        *_mesh(sizes),
        *_device(job, world),
        *_batch(job, sizes),
        *_objective(job, sizes),
        *_tensor(job, sizes["tensor"]),
        *_context(job, sizes["context"]),
        *_experts(job, sizes),
        *_pipeline(job, sizes["pipeline"]),
        *_sampling(job, sizes),
    ):
        raise ValueError(problem)


def check_gpus(ranks: int) -> None:
    """
    Raises:
        ValueError: 这台机器上的 rank 比 GPU 多。
    """
    found = torch.cuda.device_count()
    if ranks > found:
        raise ValueError(
            f"{ranks} ranks on this machine but it has {found} GPUs: start {found}, or use "
            "device=cpu"
        )


def check_peers(world: Ranks, facts: Mapping[str, Any]) -> None:
    """各 rank 跑的是同一份代码、数据与设置。

    Raises:
        ValueError: 不是；每个 rank 上都是同一句，由 rank 0 说。
    """
    everyone = world.collect(dict(facts))
    world.first(lambda: _compare(everyone))


def check_shared(run: Path) -> None:
    """
    Raises:
        ValueError: 这个 rank 看不见 rank 0 刚建的训练文件夹。
    """
    if not run.is_dir():
        raise ValueError(
            f"out={run} was made by rank 0 but another rank does not see it: put the run on a "
            "file system that all machines share"
        )


def _compare(everyone: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(everyone):
        for name in everyone[0] | facts:
            first, mine = everyone[0].get(name), facts.get(name)
            if first != mine:
                raise ValueError(
                    f"rank {rank} has {name}={_said(mine)} but rank 0 has {_said(first)}: start "
                    "all ranks with the same code, packages, run file, data and OMP_NUM_THREADS"
                )


def _mesh(sizes: Mapping[str, int]) -> Iterator[str]:
    used = [axis for axis in AXES if sizes[axis] > 1]
    for pair in combinations(used, 2):
        if frozenset(pair) not in TESTED:
            one, two = (f"parallel.{axis}={sizes[axis]}" for axis in pair)
            known = ", ".join(sorted(" x ".join(sorted(pair)) for pair in TESTED))
            yield f"{one} with {two} is not a tested combination: use one of {known}"
    if len(used) > 2:
        said = ", ".join(f"{axis}={sizes[axis]}" for axis in used)
        yield f"{len(used)} axes ({said}), but only 2 at once are tested: set the others to 1"


def _device(job: Job, world: int) -> Iterator[str]:
    if world == 1:
        return
    if job.device.startswith("cuda:"):
        yield (
            f"device={job.device} with {world} ranks: each rank takes the GPU of its own number, "
            "use device=cuda"
        )
    if job.device == "mps":
        yield f"device=mps with {world} ranks: it has no collectives, use device=cpu or 1 rank"


def _batch(job: Job, sizes: Mapping[str, int]) -> Iterator[str]:
    ranks, batch, micro = _product(sizes), job.batch_size, job.micro_batch
    if job.parallel.exact and ranks & (ranks - 1):
        yield (
            f"parallel.exact=true sums in a binary tree but {ranks} ranks read different rows: use "
            f"{1 << (ranks.bit_length() - 1)} ranks (a power of two) or parallel.exact=false"
        )
    each = ranks * (micro or 1)
    if batch % each:
        by = f"{ranks} ranks" if micro is None else f"{ranks} ranks x micro_batch={micro}"
        yield (
            f"batch_size={batch} is not a multiple of {each} ({by}): use "
            f"batch_size={max(1, round(batch / each)) * each}, or other ranks or micro_batch"
        )


def _objective(job: Job, sizes: Mapping[str, int]) -> Iterator[str]:
    """蒸馏与 DPO 要整个的头与整行；只有副本与分片给得出。"""
    if job.objective == "lm":
        return
    for axis in ("tensor", "context", "expert", "pipeline"):
        if sizes[axis] > 1:
            yield (
                f"objective.kind={job.objective} with parallel.{axis}={sizes[axis]}: it needs "
                "whole rows and the whole output head on each rank; use parallel.replicate or "
                "parallel.shard"
            )


def _product(sizes: Mapping[str, int]) -> int:
    found = 1
    for axis in DATA:
        found *= sizes[axis]
    return found


def _tensor(job: Job, tensor: int) -> Iterator[str]:
    if tensor == 1:
        return
    model = job.model
    for name, value in (
        ("n_head", model.n_head),
        ("kv heads (n_kv_head)", model.kv_heads),
        ("hidden width of the MLP", model.mlp_hidden),
        ("vocab_size", model.vocab_size),
    ):
        if value % tensor:
            yield (
                f"parallel.tensor={tensor} does not divide {name} {value}: use "
                f"{-(-value // tensor) * tensor}, or another parallel.tensor"
            )
    if job.parallel.sequence and model.context_size % tensor:
        yield (
            f"parallel.sequence=true splits model.context_size={model.context_size} over "
            f"parallel.tensor={tensor}: use a multiple, or sequence=false"
        )
    if job.optimizer == "muon":
        yield (
            f"optim.name=muon with parallel.tensor={tensor}: it orthogonalizes whole matrices and "
            "each rank would have a part; use optim.name=adamw or parallel.shard"
        )
    if model.dropout:
        yield _dropout(model, "tensor", tensor)
    if model.moe_num_experts:
        yield (
            f"model.moe_num_experts={model.moe_num_experts} with parallel.tensor={tensor}: the "
            "router would see a part of the gradient only; use parallel.expert instead"
        )


def _dropout(model: GPT2Config, axis: str, size: int) -> str:
    return (
        f"model.dropout={model.dropout} with parallel.{axis}={size}: the masks of one process "
        f"cannot be reproduced on parts; use dropout=0 or {axis}=1"
    )


def _context(job: Job, context: int) -> Iterator[str]:
    model, way = job.model, job.parallel.context_way
    if context == 1:
        if way != "auto":
            yield (
                f"parallel.context_way={way} has no effect with parallel.context=1: use "
                "parallel.context of 2 or more, or leave it out"
            )
        return
    if model.context_size % context:
        yield (
            f"parallel.context={context} does not divide model.context_size={model.context_size}: "
            f"use {-(-model.context_size // context) * context}, or another parallel.context"
        )
    if model.dropout:
        yield _dropout(model, "context", context)
    if model.moe_num_experts and model.moe.capacity_factor is not None:
        yield (
            f"model.moe.capacity_factor={model.moe.capacity_factor} with parallel.context="
            f"{context}: which tokens overflow would depend on the split; use None or context=1"
        )
    if model.moe_num_experts and model.moe.jitter_noise:
        yield (
            f"model.moe.jitter_noise={model.moe.jitter_noise} with parallel.context={context}: the "
            "noise of one process cannot be drawn again in pieces; use 0 or context=1"
        )
    if way == "halo":
        yield from _halo(model, context)
    if way == "ulysses":
        for name, value in (("n_head", model.n_head), ("kv heads (n_kv_head)", model.kv_heads)):
            if value % context:
                yield (
                    f"parallel.context_way=ulysses divides heads but {name} {value} is not a "
                    f"multiple of parallel.context={context}: use context_way=gather or ring"
                )


def _halo(model: GPT2Config, context: int) -> Iterator[str]:
    for pattern in dict.fromkeys(model.patterns):
        why = why_not_halo(pattern, model.context_size // context)
        if why is not None:
            yield (
                f"parallel.context_way=halo with attention_pattern={str(pattern)!r} and "
                f"parallel.context={context}: {why}; use a smaller parallel.context, or "
                "context_way=gather or ring"
            )


def _experts(job: Job, sizes: Mapping[str, int]) -> Iterator[str]:
    model, expert = job.model, sizes["expert"]
    if expert == 1:
        return
    if not model.moe_num_experts:
        yield f"parallel.expert={expert} but model.moe_num_experts=0: use parallel.replicate"
    elif model.moe_num_experts % expert:
        yield (
            f"parallel.expert={expert} does not divide model.moe_num_experts="
            f"{model.moe_num_experts}: use {-(-model.moe_num_experts // expert) * expert} experts, "
            "or another parallel.expert"
        )


def _pipeline(job: Job, pipeline: int) -> Iterator[str]:
    model, schedule = job.model, job.parallel.schedule
    if pipeline == 1:
        if schedule != ParallelConfig().schedule:
            yield (
                f"parallel.schedule={schedule} has no effect with parallel.pipeline=1: use "
                "parallel.pipeline of 2 or more, or leave it out"
            )
        return
    stages = stages_of(job.parallel)
    if model.n_layer < stages:
        yield (
            f"parallel.pipeline={pipeline} with schedule {schedule} has {stages} stages but "
            f"model.n_layer={model.n_layer}: use fewer stages or more layers"
        )
    if job.micro_batch is not None:
        yield from _micro_batches(job, stages)
    if schedule in _FOLDED and job.parallel.shard > 1 and model.tie_weights:
        yield (
            f"parallel.schedule={schedule} keeps both ends of the model on one rank, and "
            f"parallel.shard={job.parallel.shard} cannot share their tied weights between two "
            "groups: use schedule=1f1b or interleaved, or model.tie_weights=false"
        )
    if schedule in _SPLIT_BACKWARD:
        if model.moe_num_experts:
            yield (
                f"parallel.schedule={schedule} splits the backward pass, which loses the balance "
                f"loss of model.moe_num_experts={model.moe_num_experts}: use schedule=1f1b"
            )
        if job.compile == "on":
            yield (
                f"parallel.schedule={schedule} splits the backward pass but compile=on makes it "
                "one: use schedule=1f1b or compile=off"
            )


def stages_of(parallel: ParallelConfig) -> int:
    """流水线一共几段；没有流水线是一段。"""
    each = 1 if parallel.pipeline == 1 or parallel.schedule in ("gpipe", "1f1b") else 2
    return parallel.pipeline * each


def _micro_batches(job: Job, stages: int) -> Iterator[str]:
    assert job.micro_batch is not None
    parallel = job.parallel
    data = max(1, parallel.replicate) * parallel.shard * parallel.expert
    found = job.batch_size // (data * job.micro_batch)
    least = 1 if parallel.schedule == "gpipe" else stages
    if found < least or found % parallel.pipeline:
        yield (
            f"batch_size={job.batch_size} and micro_batch={job.micro_batch} give {found} "
            f"micro-batches, but parallel.pipeline={parallel.pipeline} with schedule "
            f"{parallel.schedule} needs a multiple of {parallel.pipeline}, at least {least}: use "
            "a larger batch_size or a smaller micro_batch"
        )


def _sampling(job: Job, sizes: Mapping[str, int]) -> Iterator[str]:
    for axis in ("tensor", "context", "pipeline", "expert"):
        if sizes[axis] > 1 and job.sample_tokens:
            yield (
                f"sample_tokens={job.sample_tokens} with parallel.{axis}={sizes[axis]}: a split "
                "model does not generate; use sample_tokens=0 and `gpt2 generate` on a checkpoint"
            )


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

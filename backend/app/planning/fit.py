"""放得下吗：内存的账、试跑的大小、放不下时的拒绝与放得下的设置。只决定，不打印。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.common.memory import resident_memory
from app.common.units import size
from app.training.config import TrainConfig
from app.training.machine.runtime import Runtime
from app.training.optim.build import optimizer_kind

from .available_memory import available_memory
from .flops import flops_per_token
from .footprint import Footprint, footprint, largest, with_others
from .probe import Estimate, ProbeFailed, few_layers, probe, probe_layers
from .sizes import parameters_by_part
from .tuned import ALONE, Beside

# CPU 上一次试跑至多这么多浮点运算，放不下就少量几条序列。
_PROBE_FLOPS = 4e12
_PROBE_STEPS = 4
_PROBE_SECONDS = 150.0
_RECOMPUTE = "--activation-checkpointing 1"

Measure = Callable[[TrainConfig], Footprint]


@dataclass(frozen=True)
class Room:
    """内存的账。

    Attributes:
        available: 可用的字节数；None = 不知道。
        program: 程序本身（Python 与 torch）占的，也从可用的里出。
        scale: 量到的峰值与推算的之比；没有量就是 1。
        kind: 数字是怎样来的，英文。
    """

    available: int | None
    where: str
    program: int
    scale: float = 1.0
    kind: str = "estimated"

    def needs(self, found: Footprint) -> int:
        return round(found.peak * self.scale) + self.program


@dataclass(frozen=True)
class Assessment:
    """一份配置的训练要占多少、多久。

    Attributes:
        estimate: 试跑量到的；没有量则 None，why_not 是理由。
        refused: 放不下的话，理由与改法。
    """

    footprint: Footprint
    room: Room
    estimate: Estimate | None
    why_not: str
    refused: str | None


def assess(
    config: TrainConfig, runtime: Runtime, probing: bool, beside: Beside = ALONE
) -> Assessment:
    """推算；probing 时若放得下就再试跑，以量到的为准。"""

    def measure(changed: TrainConfig) -> Footprint:
        return training_footprint(changed, runtime, beside)

    room, found = room_on(runtime), measure(config)
    refused = refusal(config, room, measure)
    if not probing:
        return Assessment(found, room, None, "add --probe to measure it", refused)
    if refused is not None:
        return Assessment(found, room, None, "not measured: it does not fit", refused)
    if config.tune.trainable != "all" or config.objective.kind != "lm":
        why = "not measured: --probe trains all weights on text; gpt2 finetune --dry-run measures"
        return Assessment(found, room, None, why, None)
    parameters = sum(parameters_by_part(config.model).values())
    try:
        estimate = probe(config, parameters, rows=probe_rows(config, runtime), limit=_PROBE_SECONDS)
    except ProbeFailed as error:
        return Assessment(found, room, None, f"not measured: {error}", None)
    if estimate.peak is not None:
        room = Room(
            available=room.available,
            where=room.where,
            program=estimate.base or 0,
            scale=estimate.peak / found.peak,
            kind="extrapolated from a measurement",
        )
        refused = refusal(config, room, measure)
    return Assessment(found, room, estimate, "", refused)


def room_on(runtime: Runtime) -> Room:
    """此刻可用的内存，与程序已占的。"""
    available, where = available_memory(runtime.device)
    program = resident_memory() if runtime.device.type == "cpu" else 0
    return Room(available, where, program or 0)


def training_footprint(config: TrainConfig, runtime: Runtime, beside: Beside) -> Footprint:
    """按 config 在 runtime 上训练占的内存。"""
    tokens = config.rows_at_once * config.model.context_size
    found = footprint(
        config.model,
        rows=config.rows_at_once,
        passes=config.passes,
        optimizer=optimizer_kind(config.optim),
        device=runtime.device,
        dtype=runtime.dtype,
        recompute=config.recomputed_layers,
        parts=beside.parts(config),
    )
    return with_others(found, beside, tokens, runtime.dtype, runtime.device)


def probe_rows(config: TrainConfig, runtime: Runtime) -> int:
    """试跑一次前向几条序列：GPU 上是整个微批，CPU 上以 _PROBE_FLOPS 为限。"""
    if runtime.device.type != "cpu":
        return config.rows_at_once
    small = few_layers(config.model, probe_layers(config)[-1])
    row = flops_per_token(small).total * small.context_size * min(2, config.passes) * _PROBE_STEPS
    return max(1, min(config.rows_at_once, int(_PROBE_FLOPS / row)))


def refusal(config: TrainConfig, room: Room, measure: Measure) -> str | None:
    """放得下（或不知道有多少）就是 None；否则说出大小与放得下的设置。"""
    available = room.available
    if available is None:
        return None
    needed = room.needs(measure(config))
    if needed <= available:
        return None

    def fits(changed: TrainConfig) -> bool:
        return room.needs(measure(changed)) <= available

    return (
        f"training does not fit: {size(needed)} ({room.kind}) with {config.rows_at_once} "
        f"sequences of {config.model.context_size:,} tokens at once, but {size(available)} are "
        f"available ({room.where}): {_same_result(config, fits) or _smaller(config, fits)}"
    )


def _same_result(config: TrainConfig, fits: Callable[[TrainConfig], bool]) -> str | None:
    """结果不变而放得下的设置；没有则 None。"""
    recomputed = config.replace(activation_checkpointing=1)
    ways = []
    if rows := _most_rows(config, fits):
        ways.append(f"--micro-batch {rows}")
    if config.activation_checkpointing != 1 and fits(recomputed):
        ways.append(f"{_RECOMPUTE} (slower)")
    elif not ways and (rows := _most_rows(recomputed, fits)):
        ways.append(f"--micro-batch {rows} {_RECOMPUTE} (slower)")
    return f"use {' or '.join(ways)} (the result stays the same)" if ways else None


def _most_rows(config: TrainConfig, fits: Callable[[TrainConfig], bool]) -> int:
    """比现在少的最大的微批；0 = 一条也放不下。"""
    return largest(lambda rows: fits(config.replace(micro_batch=rows)), config.rows_at_once - 1)


def _smaller(config: TrainConfig, fits: Callable[[TrainConfig], bool]) -> str:
    if config.init_from is None:
        return _smaller_model(config, fits)
    # 形状是起点的，改不了。
    lora = " or --tune.trainable lora" if config.tune.trainable == "all" else ""
    return (
        f"not even one sequence fits: use a shorter --model.context-size (now "
        f"{config.model.context_size:,}){lora}, or start from a smaller model"
    )


def _smaller_model(config: TrainConfig, fits: Callable[[TrainConfig], bool]) -> str:
    shape, least = config.model, _fewest_layers(config)
    one = config.replace(activation_checkpointing=1, micro_batch=1)
    layers = largest(
        lambda n: n < least or fits(one.replace(model=shape.replace(n_layer=n))), shape.n_layer - 1
    )
    if layers >= least:
        return (
            f"a smaller model fits, such as --micro-batch 1 {_RECOMPUTE} "
            f"--model.n-layer {layers} (instead of {shape.n_layer})"
        )
    return (
        f"not even {least} layer{'s' if least > 1 else ''} would fit: use a smaller "
        f"--model.n-embed (now {shape.n_embed}), --model.vocab-size or --model.context-size"
    )


def _fewest_layers(config: TrainConfig) -> int:
    """再少就不成图样的一轮，没有 MoE 层，或名单里的层不在了。"""
    shape = config.model
    cycle = len(shape.attention_pattern) if isinstance(shape.attention_pattern, tuple) else 1
    if not shape.moe_layers:
        return cycle
    return max(cycle, shape.moe_layers[-1 if shape.moe.layers else 0] + 1)

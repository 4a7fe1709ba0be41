"""`gpt2 plan` 的训练部分：运算量、内存、时间，与放不下时的拒绝。估计的与量到的分开说。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.cli.shared.tables import Table, print_table
from app.common.units import duration, size
from app.training.config import TrainConfig

if TYPE_CHECKING:
    from app.planning.footprint import Footprint
    from app.planning.probe import Estimate
    from app.training.machine.runtime import Runtime

# CPU 上一次试跑至多这么多浮点运算，放不下就少量几条序列。
_PROBE_FLOPS = 4e12
_PROBE_STEPS = 4
_PROBE_SECONDS = 150.0
_RECOMPUTE = "--activation-checkpointing 1"


@dataclass(frozen=True)
class Room:
    """内存的账。

    Attributes:
        available: 可用的字节数；None = 不知道。
        program: 程序本身（Python 与 torch）占的，也从可用的里出。
        scale: 量到的峰值与推算的之比；没有量就是 1。
    """

    available: int | None
    where: str
    program: int
    scale: float = 1.0

    def needs(self, found: Footprint) -> int:
        return round(found.peak * self.scale) + self.program


def show_training(config: TrainConfig, runtime: Runtime, probing: bool) -> str | None:
    """打印各表；放不下时返回理由与改法。"""
    from app.common.memory import resident_memory
    from app.planning.available_memory import available_memory
    from app.planning.sizes import parameters_by_part

    available, where = available_memory(runtime.device)
    program = resident_memory() if runtime.device.type == "cpu" else 0
    room = Room(available, where, program or 0)

    def measure(changed: TrainConfig) -> Footprint:
        return _footprint(changed, runtime)

    parameters = sum(parameters_by_part(config.model).values())
    estimate, why = None, "add --probe to measure it"
    refused = refusal(config, room, measure)
    if probing and refused is None:
        estimate, why = _probe(config, runtime, parameters)
        if estimate is not None and estimate.peak is not None:
            scale = estimate.peak / measure(config).peak
            room = Room(available, where, estimate.base or 0, scale)
            refused = refusal(config, room, measure, measured=True)
    elif probing:
        why = "not measured: it does not fit"
    _print_steps(config)
    _print_memory(config, measure(config), room, estimate)
    _print_time(config, estimate, why)
    return refused


def _footprint(config: TrainConfig, runtime: Runtime) -> Footprint:
    from app.planning.footprint import footprint

    rows = config.micro_batch or config.batch_size
    return footprint(
        config.model,
        rows=rows,
        passes=-(-config.batch_size // rows),
        muon=config.optim.name == "muon",
        device=runtime.device,
        dtype=runtime.dtype,
        recompute=config.recomputed_layers,
    )


def refusal(
    config: TrainConfig,
    room: Room,
    measure: Callable[[TrainConfig], Footprint],
    measured: bool = False,
) -> str | None:
    """放得下（或不知道有多少）就是 None；否则说出大小与放得下的设置。"""
    from app.planning.footprint import largest

    available = room.available
    if available is None or room.needs(measure(config)) <= available:
        return None

    def fits(changed: TrainConfig) -> bool:
        return room.needs(measure(changed)) <= available

    rows = config.micro_batch or config.batch_size
    kind = "extrapolated from a measurement" if measured else "estimated"
    text = (
        f"training does not fit: {size(room.needs(measure(config)))} ({kind}) with {rows} "
        f"sequences of {config.model.context_size:,} tokens at once, but {size(available)} are "
        f"available ({room.where}): "
    )
    most = config.replace(activation_checkpointing=1)
    ways = []
    if micro := largest(lambda m: fits(config.replace(micro_batch=m)), rows - 1):
        ways.append(f"--micro-batch {micro}")
    if config.activation_checkpointing != 1 and fits(most):
        ways.append(f"{_RECOMPUTE} (slower)")
    elif not ways and (micro := largest(lambda m: fits(most.replace(micro_batch=m)), rows - 1)):
        ways.append(f"--micro-batch {micro} {_RECOMPUTE} (slower)")
    if ways:
        return text + f"use {' or '.join(ways)} (the result stays the same)"
    one, given = most.replace(micro_batch=1), config.model.attention_pattern
    cycle = len(given) if isinstance(given, tuple) else 1
    if config.model.moe_layers:
        # 再少就没有 MoE 层，或名单里的层不在了。
        cycle = max(cycle, config.model.moe_layers[-1 if config.model.moe.layers else 0] + 1)
    layers = largest(
        lambda n: n < cycle or fits(one.replace(model=config.model.replace(n_layer=n))),
        config.model.n_layer - 1,
    )
    if layers >= cycle:
        return text + (
            f"a smaller model fits, such as --micro-batch 1 {_RECOMPUTE} "
            f"--model.n-layer {layers} (instead of {config.model.n_layer})"
        )
    return text + (
        f"not even {cycle} layer{'s' if cycle > 1 else ''} would fit: use a smaller "
        f"--model.n-embed (now {config.model.n_embed}), --model.vocab-size or "
        "--model.context-size"
    )


def _probe(config: TrainConfig, runtime: Runtime, parameters: int) -> tuple[Estimate | None, str]:
    """(量到的, 没有量到的理由)。"""
    from app.planning.probe import ProbeFailed, probe

    rows = probe_rows(config, runtime)
    try:
        return probe(config, parameters, rows=rows, limit=_PROBE_SECONDS), ""
    except ProbeFailed as error:
        return None, f"not measured: {error}"


def probe_rows(config: TrainConfig, runtime: Runtime) -> int:
    """试跑一次前向几条序列：GPU 上是整个微批，CPU 上以 _PROBE_FLOPS 为限。"""
    from app.planning.flops import flops_per_token
    from app.planning.probe import few_layers, probe_layers

    rows = config.micro_batch or config.batch_size
    if runtime.device.type != "cpu":
        return rows
    small = few_layers(config.model, probe_layers(config)[-1])
    passes = min(2, -(-config.batch_size // rows))
    row = flops_per_token(small).total * small.context_size * passes * _PROBE_STEPS
    return max(1, min(rows, int(_PROBE_FLOPS / row)))


def _print_steps(config: TrainConfig) -> None:
    from app.planning.flops import FORMULA, flops_per_token

    one = flops_per_token(config.model)
    tokens = config.tokens_per_step
    about = "" if one.exact else "~"
    share = f"attention is {one.attention / one.forward:.0%} of it"
    table: Table = [("compute", "per token", "per step", "")]
    for name, count, why in (
        ("forward", one.forward, share),
        ("backward", one.backward, "twice the forward"),
        ("both", one.total, FORMULA),
    ):
        table.append((name, about + flop(count), about + flop(count * tokens), why))
    print(f"training, {config.batch_size:,} x {config.model.context_size:,} tokens a step")
    print_table(table)


def _print_memory(
    config: TrainConfig, found: Footprint, room: Room, estimate: Estimate | None
) -> None:
    rows = config.micro_batch or config.batch_size
    optimizer = "AdamW's two moments"
    if config.optim.name == "muon":
        optimizer = "Muon's momentum for the matrices of the blocks, AdamW's moments for the rest"
    at_once = f"{rows:,} x {config.model.context_size:,} tokens at once"
    if every := config.activation_checkpointing:
        which = "every block" if every == 1 else f"one block in {every}"
        at_once += f", {which} recomputed ({size(found.recomputed)} at a time)"
    table: Table = [
        ("weights", size(found.weights), "float32"),
        ("gradients", size(found.gradients), "float32"),
        ("optimizer", size(found.optimizer), optimizer),
        ("activations", size(found.activations), f"{at_once}, freed layer by layer"),
        ("logits", size(found.logits), "the loss goes through them in chunks"),
    ]
    if room.program:
        table.append(("program", size(room.program), "Python and torch themselves"))
    needed = found.peak + room.program
    why = "estimated from the config; less than the sum, for not all live at once"
    if estimate is not None and estimate.peak is not None:
        needed, why = estimate.peak + room.program, _measured(config, estimate)
        why += f"; from the config {size(found.peak + room.program)}"
    table.append(("peak", size(needed), why))
    there = "unknown" if room.available is None else size(room.available)
    table.append(("available", there, room.where))
    print("memory in training")
    print_table(table)


def _print_time(config: TrainConfig, estimate: Estimate | None, why: str) -> None:
    from app.planning.flops import flops_per_token

    print("time in training")
    if estimate is None:
        print_table([("step", "unknown", why)])
        return
    rate = config.tokens_per_step / estimate.seconds
    speed = flops_per_token(config.model).total * rate
    how = _measured(config, estimate)
    if config.compile == "on":
        how += ", without torch.compile"
    print_table(
        [
            ("step", seconds(estimate.seconds), how),
            ("speed", f"{rate:,.0f} tokens/s", f"{flop(speed)}/s"),
            (
                "run",
                seconds(estimate.seconds * config.steps),
                f"{config.steps:,} steps; validation, samples and checkpoints come on top",
            ),
        ]
    )


def _measured(config: TrainConfig, estimate: Estimate) -> str:
    layers, micro = config.model.n_layer, config.micro_batch or config.batch_size
    text = "measured"
    if estimate.layers < layers:
        text = f"extrapolated from measured {estimate.layers} of {layers} layers"
    if estimate.rows < micro:
        text += f" on {estimate.rows} of {micro} sequences"
    return text


def flop(count: float) -> str:
    """1.50 GFLOP：三位有效数字上下，单位每级一千。"""
    units = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:,.{2 if count < 10 else 1 if count < 100 else 0}f} {units[power]}FLOP"


def seconds(value: float) -> str:
    """给人读的时间：12.3 ms、4.5 s、3m05s、2h07m、12.3 days。"""
    if value < 1:
        return f"{value * 1000:.1f} ms"
    if value < 10:
        return f"{value:.1f} s"
    return duration(value) if value < 48 * 3600 else f"{value / 86400:,.1f} days"

"""`gpt2 plan` 的训练部分：运算量、内存、时间，各一张表。估计的与量到的分开说。"""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.cli.shared.tables import Table, print_table
from app.common.units import duration, size
from app.training.config import TrainConfig

if TYPE_CHECKING:
    from app.planning.fit import Assessment
    from app.planning.probe import Estimate
    from app.planning.tuned import Beside
    from app.training.machine.runtime import Runtime


def show_training(
    config: TrainConfig, runtime: Runtime, probing: bool, beside: Beside
) -> str | None:
    """打印各表；放不下时返回理由与改法。"""
    from app.planning.fit import assess

    found = assess(config, runtime, probing, beside)
    _print_steps(config)
    _print_memory(config, found)
    _print_time(config, found)
    return found.refused


def _print_steps(config: TrainConfig) -> None:
    from app.planning.flops import FORMULA, flops_per_token

    one = flops_per_token(config.model)
    tokens = config.tokens_per_step
    about = "" if one.exact else "~"
    share = f"attention is {one.attention / one.forward:.0%} of it"
    backward = "twice the forward"
    if config.tune.trainable != "all":
        backward += " at most: frozen weights need no gradient"
    table: Table = [("compute", "per token", "per step", "")]
    for name, count, why in (
        ("forward", one.forward, share),
        ("backward", one.backward, backward),
        ("both", one.total, FORMULA),
    ):
        table.append((name, about + flop(count), about + flop(count * tokens), why))
    print(f"training, {config.batch_size:,} x {config.model.context_size:,} tokens a step")
    print_table(table)


def _print_memory(config: TrainConfig, assessed: Assessment) -> None:
    from app.training.optim.build import optimizer_kind

    found, room, estimate = assessed.footprint, assessed.room, assessed.estimate
    keeps = optimizer_kind(config.optim).keeps
    at_once = f"{config.rows_at_once:,} x {config.model.context_size:,} tokens at once"
    if every := config.activation_checkpointing:
        which = "every block" if every == 1 else f"one block in {every}"
        at_once += f", {which} recomputed ({size(found.recomputed)} at a time)"
    table: Table = [
        ("weights", size(found.weights), "float32"),
        ("gradients", size(found.gradients), "float32"),
        ("optimizer", size(found.optimizer), keeps),
        ("activations", size(found.activations), f"{at_once}, freed layer by layer"),
        ("logits", size(found.logits), "the loss goes through them in chunks"),
    ]
    if found.teacher:
        table.append(("teacher", size(found.teacher), f"{config.objective.teacher}, never trained"))
    if found.reference:
        why = f"{config.objective.reference}, before the first step only"
        table.append(("reference", size(found.reference), why))
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


def _print_time(config: TrainConfig, assessed: Assessment) -> None:
    from app.planning.flops import flops_per_token

    estimate = assessed.estimate
    print("time in training")
    if estimate is None:
        print_table([("step", "unknown", assessed.why_not)])
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
    layers, micro = config.model.n_layer, config.rows_at_once
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

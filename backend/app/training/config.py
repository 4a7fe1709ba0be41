"""训练配置：冻结的数据类，不依赖 torch；每个错误点名值与改法。

一步 = 一次优化器更新 = batch_size 条序列，每条 model.context_size 个词元。
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from typing_extensions import Doc

from app.distributed.config import ParallelConfig
from app.models.transformer.config import GPT2Config
from app.models.transformer.settings.fields import Mark, nearest, normalise_types
from app.models.transformer.settings.tune_config import TuneConfig

from .settings.bounds import between
from .settings.data import DataConfig
from .settings.objective import ObjectiveConfig
from .settings.time_limit import seconds_of

__all__ = [
    "DataConfig", "ObjectiveConfig", "OptimConfig", "ScheduleConfig", "TrainConfig", "TuneConfig",
    "flat",
]  # fmt: skip

Precision = Literal["auto", "float32", "bfloat16"]
Switch = Literal["auto", "on", "off"]
Optimizer = Literal["adamw", "muon"]
Decay = Literal["cosine", "wsd", "linear"]
SpikePolicy = Literal["off", "warn", "skip"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW（Loshchilov & Hutter 2019, arXiv:1711.05101）或 Muon（muon.py），与梯度裁剪。"""

    name: Annotated[
        Optimizer, Doc("adamw, or muon for the matrices of the blocks and AdamW for the rest")
    ] = "adamw"
    lr: Annotated[float, Doc("peak learning rate")] = 1e-3
    muon_lr: Annotated[
        float | None, Doc("peak learning rate of Muon's matrices, in AdamW's scale; None = lr")
    ] = None
    betas: Annotated[tuple[float, float], Doc("AdamW's two decay rates")] = (0.9, 0.95)
    eps: Annotated[float, Doc("AdamW's epsilon")] = 1e-8
    weight_decay: Annotated[float, Doc("decay of matrices; norms and biases have none")] = 0.1
    grad_clip: Annotated[float, Doc("largest gradient norm; 0 = no clipping")] = 1.0

    def __post_init__(self) -> None:
        normalise_types(self)
        between(self, "lr", 0.0, 100.0, open_low=True)
        if self.muon_lr is not None:
            between(self, "muon_lr", 0.0, 100.0, open_low=True)
        between(self, "eps", 0.0, 1.0, open_low=True)
        between(self, "weight_decay", 0.0, 100.0)
        between(self, "grad_clip", 0.0, math.inf)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must each be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """线性预热，然后降到 min_lr_ratio·lr；各种降法见 schedule.py。"""

    kind: Annotated[
        Decay, Doc("after warm-up: cosine, linear, or wsd (stable, then decay at the end)")
    ] = "cosine"
    warmup_steps: Annotated[int, Doc("steps of linear warm-up")] = 100
    min_lr_ratio: Annotated[float, Doc("final learning rate as a part of the peak")] = 0.1
    decay_fraction: Annotated[float, Doc("wsd: part of all steps spent in the final decay")] = 0.2

    def __post_init__(self) -> None:
        normalise_types(self)
        between(self, "warmup_steps", 0, math.inf)
        between(self, "min_lr_ratio", 0.0, 1.0)
        between(self, "decay_fraction", 0.0, 1.0, open_low=True)

    def decay_steps(self, steps: int) -> int:
        """wsd：总共 steps 步时，最后降几步；至少一步。"""
        return max(1, round(self.decay_fraction * steps))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """一次训练的全部设置；同一份配置与数据给出同一串权重。

    Raises:
        ValueError: 值越界或互相矛盾。
    """

    model: Annotated[GPT2Config, Doc("shape of the model")] = field(default_factory=GPT2Config)
    data: Annotated[DataConfig, Doc("what it reads")] = field(default_factory=DataConfig)
    optim: Annotated[OptimConfig, Doc("optimizer, clipping")] = field(default_factory=OptimConfig)
    schedule: Annotated[ScheduleConfig, Doc("learning rate over the steps")] = field(
        default_factory=ScheduleConfig
    )
    objective: Annotated[ObjectiveConfig, Doc("what it minimises")] = field(
        default_factory=ObjectiveConfig
    )
    tune: Annotated[TuneConfig, Doc("which weights it trains")] = field(default_factory=TuneConfig)
    parallel: Annotated[ParallelConfig, Doc("how torchrun or --ranks divides the work")] = field(
        default_factory=ParallelConfig
    )
    out: Annotated[
        str, Doc("run folder: checkpoints, metrics and plot"), Mark.SILENT, Mark.ASIDE
    ] = "runs/train"
    resume: Annotated[
        str,
        Doc("none, auto (newest valid checkpoint in the run folder), or a checkpoint folder"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = "none"
    init_from: Annotated[
        str | None,
        Doc("run, checkpoint or model folder: start at step 0 from its weights; None = random"),
        Mark.SILENT,
    ] = None
    steps: Annotated[int, Doc("optimizer steps")] = 1000
    epochs: Annotated[
        float | None,
        Doc("times over the data, instead of steps; becomes steps when the data is open"),
    ] = None
    time_limit: Annotated[
        str | None,
        Doc("such as 30m, 1h30m: ends in time, with the learning rate brought down before"),
    ] = None
    batch_size: Annotated[int, Doc("sequences per optimizer step")] = 32
    micro_batch: Annotated[
        int | None, Doc("sequences at once; smaller needs less memory, same result. None = all")
    ] = None
    seed: Annotated[int, Doc("seed of weights, dropout and batches"), Mark.ASIDE] = 0
    device: Annotated[str, Doc("auto, cpu, cuda, cuda:1, mps")] = "auto"
    precision: Annotated[
        Precision, Doc("auto = bfloat16 where the hardware computes in it, else float32")
    ] = "auto"
    compile: Annotated[Switch, Doc("torch.compile per block; auto = where it pays and works")] = (
        "auto"
    )
    activation_checkpointing: Annotated[
        int,
        Doc("recompute the activations of every n-th block: less memory, same result; 0 = off"),
        Mark.SILENT,
    ] = 0
    spike: Annotated[
        SpikePolicy,
        Doc("a step 6 sigma above the last 128 in loss or gradient: warn, skip its update, or off"),
    ] = "warn"
    eval_every: Annotated[
        int, Doc("steps between validations; 0 = only at the end"), Mark.SILENT, Mark.ASIDE
    ] = 250
    eval_batches: Annotated[
        int,
        Doc("validation batches, evenly spread over the split; 0 = the whole split"),
        Mark.SILENT,
    ] = 20
    patience: Annotated[
        int,
        Doc("end after this many validations in a row without a better loss; 0 = train all steps"),
        Mark.SILENT,
    ] = 0
    min_delta: Annotated[
        float, Doc("patience: a loss counts as better only when this much lower"), Mark.SILENT
    ] = 0.0
    sample_every: Annotated[
        int, Doc("steps between samples; 0 = only at the end"), Mark.SILENT, Mark.ASIDE
    ] = 500
    sample_prompt: Annotated[
        str, Doc("text that samples continue; empty = a line break"), Mark.SILENT, Mark.ASIDE
    ] = ""
    sample_tokens: Annotated[
        int, Doc("tokens per sample; 0 = no samples"), Mark.SILENT, Mark.ASIDE
    ] = 120
    save_every: Annotated[
        int, Doc("steps between checkpoints; 0 = only at the end"), Mark.SILENT, Mark.ASIDE
    ] = 500
    keep_last: Annotated[
        int, Doc("newest checkpoints kept; the best one is kept besides"), Mark.SILENT, Mark.ASIDE
    ] = 2
    keep_every: Annotated[
        int,
        Doc("also save every so many steps, and keep those: the history to look into; 0 = none"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = 0
    tensorboard: Annotated[
        bool,
        Doc("also write TensorBoard events; needs the extra 'tensorboard'"),
        Mark.SILENT,
        Mark.ASIDE,
    ] = False

    def __post_init__(self) -> None:
        normalise_types(self)
        for name in ("steps", "batch_size", "keep_last"):
            between(self, name, 1, 1 << 40)
        for name in (
            "eval_every",
            "eval_batches",
            "patience",
            "sample_every",
            "sample_tokens",
            "save_every",
            "keep_every",
            "activation_checkpointing",
        ):
            between(self, name, 0, 1 << 40)
        between(self, "seed", 0, (1 << 63) - 1)
        between(self, "min_delta", 0.0, math.inf)
        if self.epochs is not None:
            between(self, "epochs", 0.0, 1e6, open_low=True)
        if self.time_limit is not None:
            seconds_of(self.time_limit)
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise ValueError(
                f"micro_batch={self.micro_batch} must be between 1 and "
                f"batch_size={self.batch_size}, or None for the whole batch"
            )
        if self.patience and not self.eval_every:
            raise ValueError(
                f"patience={self.patience} counts validations but eval_every=0 makes none before "
                "the end: use eval_every above 0, or patience=0"
            )
        if self.epochs is None:
            self._check_schedule()
        if self.objective.kind == "dpo":
            self._check_pairs()
        for name in ("out", "resume", "device", "init_from"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: give a value or leave it out")
        # 它若也是 DPO 的参考、适配器的原模型，续训时还要。
        weights_only = self.objective.kind != "dpo" and self.tune.trainable == "all"
        if weights_only and self.init_from is not None and self.resume not in ("none", "auto"):
            raise ValueError(
                f"init_from={self.init_from} and resume={self.resume} both give the weights: use "
                "resume to go on exactly, init_from to start anew at step 0"
            )

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule.warmup_steps >= self.steps and schedule.warmup_steps > 0:
            raise ValueError(
                f"schedule.warmup_steps={schedule.warmup_steps} is not below "
                f"steps={self.steps}: use fewer warm-up steps or more steps"
            )
        decay = schedule.decay_steps(self.steps)
        if schedule.kind == "wsd" and schedule.warmup_steps + decay >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps={schedule.warmup_steps} and the decay over {decay} steps "
                f"(decay_fraction={schedule.decay_fraction}) do not fit below steps={self.steps}: "
                "use less of either or more steps"
            )

    def _check_pairs(self) -> None:
        """一对两行，不可拆开；与参考比的是同一个模型，所以没有 dropout。"""
        if self.init_from is None:
            raise ValueError(
                f"objective.kind=dpo but init_from={self.init_from}: it tunes a trained model; "
                "name its folder"
            )
        for name in ("batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value % 2:
                raise ValueError(
                    f"{name}={value} is odd but objective.kind=dpo reads pairs of rows (chosen, "
                    f"rejected): use {name}={value + 1}"
                )
        for name, value in (
            ("model.dropout", self.model.dropout), ("tune.lora_dropout", self.tune.lora_dropout),
        ):  # fmt: skip
            if value:
                raise ValueError(
                    f"{name}={value} but objective.kind=dpo compares the model with its "
                    f"reference, which has none: use {name}=0"
                )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.context_size

    def saves_at(self, step: int) -> bool:
        """途中做完 step 步要不要存。"""
        return any(every and step % every == 0 for every in (self.save_every, self.keep_every))

    @property
    def rows_at_once(self) -> int:
        """一次前向几条序列。"""
        return self.micro_batch or self.batch_size

    @property
    def passes(self) -> int:
        """一步几次前向；最后一次可以不满。"""
        return -(-self.batch_size // self.rows_at_once)

    @property
    def recomputed_layers(self) -> range:
        """激活检查点重算哪些块（从 0 数）。"""
        every = self.activation_checkpointing
        return range(0, self.model.n_layer if every else 0, every or 1)

    @property
    def seconds(self) -> float | None:
        """time_limit 是几秒。"""
        return None if self.time_limit is None else seconds_of(self.time_limit)

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["optim"]["betas"] = list(self.optim.betas)
        data["tune"]["lora_targets"] = list(self.tune.lora_targets)
        if self.epochs is not None:
            data["steps"] = None
        return data | {"model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, data: Any) -> TrainConfig:
        """从 YAML 或 JSON 读出的字典恢复。

        Raises:
            ValueError: 未知的键（给出最近的名字）或坏值；steps 与 epochs 都给了。
        """
        if isinstance(data, dict) and None not in (data.get("steps"), data.get("epochs")):
            raise ValueError(
                f"steps={data['steps']} and epochs={data['epochs']} both say how long: give one"
            )
        if isinstance(data, dict) and "steps" in data and data["steps"] is None:
            data = {key: value for key, value in data.items() if key != "steps"}
        return _build(cls, _without_version(data), "")


def _build(kind: type[T], data: Any, where: str) -> T:
    """按字段类型构造；YAML 1.1 把 `1e-3` 读成文字，浮点字段在此转换。"""
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the run file'} must be a mapping, got {data!r}")
    hints = get_type_hints(kind)
    values = {}
    for key, value in data.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ValueError(f"unknown option {name!r}{nearest(str(key), list(hints))}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, name)
        elif hints[key] in (float, float | None) and isinstance(value, str):
            values[key] = _number(value, name)
        elif get_origin(hints[key]) is tuple and isinstance(value, list):
            numbers = float in get_args(hints[key])
            values[key] = tuple(
                _number(v, name) if numbers and isinstance(v, str) else v for v in value
            )
        else:
            values[key] = value
    return kind(**values)


def _without_version(data: Any) -> Any:
    """model 里可以有模型文件夹记下的版本号；认不认得由 GPT2Config 说。"""
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict) or "schema_version" not in model:
        return data
    rest = {key: value for key, value in model.items() if key != "schema_version"}
    GPT2Config.from_dict({"schema_version": model["schema_version"]})
    return data | {"model": rest}


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """嵌套的设置 -> (带点的名字, 值)。"""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

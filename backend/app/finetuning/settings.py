"""微调的默认设置：起点、数据、想训练什么 -> 一份每项都写明的 TrainConfig。

笔记本电脑也跑得动的一套；每个数旁边是它的来处。T 上下文长度。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.data.feed import Feed
from app.data.shards import Kind
from app.models.transformer import GPT2Config
from app.training.config import (
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    TuneConfig,
)

from .given import applied

# nanoGPT 微调 gpt2-xl 用 3e-5；LoRA 的仓库 2e-4；只训练末两层 5e-5（Raschka 2024，第 6 章）。
RATES = {"all": 3e-5, "lora": 2e-4, "last": 5e-5, "head": 5e-5}
# TRL 的 DPO 默认；适配器的没有可引的数，取 5 倍。
DPO_RATES = {"all": 1e-6, "lora": 5e-6}
EPOCHS, DPO_EPOCHS = 3.0, 1.0
STEP_TOKENS = 8192
# 一次前向的词元：再多也不更快，只占内存。
_AT_ONCE = 2048
# 数据少到一轮不足这么多步，就把批改小：三轮只有三步的训练什么也学不到。
_STEPS_AN_EPOCH = 8
_WARM_UP = 0.03
_EVALS = 10
# 一次验证至多这么多词元，免得比训练还久。
_EVAL_TOKENS = 1 << 16
TUNED, BEFORE = "tuned", "before"


@dataclass(frozen=True)
class Wish:
    """命令行上要的。

    Attributes:
        epochs: None = 3；偏好数据 1。
        given: --set 的各项，最后盖上。

    Raises:
        ValueError: 轮数与步数都给了。
    """

    trainable: str
    epochs: float | None
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.epochs is not None and "steps" in self.given:
            raise ValueError(
                f"--epochs {self.epochs:g} and --set steps={self.given['steps']} both say how "
                "long: give one"
            )


def first_settings(
    model: GPT2Config, init_from: str, data: DataConfig, kind: Kind, wish: Wish
) -> TrainConfig:
    """还不知道有几步时的设置：打开数据用它。

    Raises:
        ValueError: --set 里没有这一项，或坏值。
    """
    dpo = kind == "preference"
    rates = DPO_RATES if dpo else RATES
    rate = rates.get(wish.trainable.partition(":")[0], rates["all"])
    rows = wish.given.get("batch_size")
    if not isinstance(rows, int) or rows < 1:
        rows = _even(STEP_TOKENS // model.context_size, dpo)
    config = TrainConfig(
        # CPU 的融合内核不做 dropout；三轮也用不着它（nanoGPT 微调同此）。
        model=model.replace(dropout=0.0),
        data=data,
        optim=OptimConfig(lr=rate, weight_decay=0.0, grad_clip=1.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=0, min_lr_ratio=0.0),
        objective=ObjectiveConfig(kind="dpo" if dpo else "lm"),
        tune=TuneConfig(trainable=wish.trainable),
        init_from=init_from,
        epochs=_epochs(wish, dpo),
        batch_size=rows,
        micro_batch=min(rows, _even(_AT_ONCE // model.context_size, dpo)),
        keep_last=1,
    )
    return applied(config, _without_length(wish.given))


def with_batch(config: TrainConfig, rows: int, wish: Wish) -> TrainConfig:
    """rows：一轮有几行；数据少就把批改小。"""
    dpo, batch, micro = config.objective.kind == "dpo", config.batch_size, config.micro_batch
    if "batch_size" not in wish.given:
        batch = min(batch, _even(rows // _STEPS_AN_EPOCH, dpo))
    if "micro_batch" not in wish.given and micro is not None:
        micro = min(micro, batch)
    return config.replace(batch_size=batch, micro_batch=micro)


def with_lengths(config: TrainConfig, feed: Feed, wish: Wish) -> TrainConfig:
    """步数，与按步数的那些；--set 的照旧盖在上面。

    Raises:
        ValueError: 步数与别的合不来。
    """
    assert config.epochs is not None
    steps = wish.given.get("steps", feed.steps_of(config.epochs))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"--set steps={steps!r} must be a whole number above 0")
    every = max(1, steps // _EVALS)
    numbers = {
        "schedule.warmup_steps": min(steps - 1, max(1, round(_WARM_UP * steps))),
        "eval_every": every,
        "eval_batches": max(1, _EVAL_TOKENS // config.tokens_per_step),
        # 只在最后答一次题：二十个回答要花不少时间。
        "sample_every": 0,
        "save_every": every,
    }
    known = {name: value for name, value in numbers.items() if name not in wish.given}
    config = config.replace(epochs=None, steps=steps)
    return applied(config, {**known, **_without_length(wish.given)})


def _epochs(wish: Wish, dpo: bool) -> float:
    """给了步数时用不到它，但总要有一个。"""
    return (DPO_EPOCHS if dpo else EPOCHS) if wish.epochs is None else wish.epochs


def _without_length(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "steps"}


def _even(rows: int, dpo: bool) -> int:
    """至少一行；偏好成对，至少两行，且是偶数。"""
    return max(2, rows // 2 * 2) if dpo else max(1, rows)

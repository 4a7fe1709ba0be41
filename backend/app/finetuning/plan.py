"""将要怎样微调：设置、读法、训练什么、多久、多少内存。只决定，不训练，也不打印。"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from app.adapters.files import is_adapter
from app.adapters.fit import fit_context, shrunk
from app.adapters.rows import grow_vocabulary, grown_config
from app.adapters.trainable import Said, apply_trainable
from app.common.tell import Tell
from app.data.shards import TokenDataset
from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.tune_config import TuneConfig
from app.planning.fit import Room, training_footprint
from app.planning.footprint import largest
from app.planning.tuned import Beside
from app.training.config import DataConfig, TrainConfig
from app.training.machine.runtime import Runtime, choose_runtime
from app.training.objectives.build import build_objective, load_other
from app.training.opened import Data, feed_of, open_data
from app.training.saving.initial import new_tokens
from app.training.saving.tuned import check_tune

from .estimate import check_room, fits
from .settings import BEFORE, TUNED, Wish, first_settings, with_batch, with_lengths


@dataclass(frozen=True)
class Start:
    """从哪里起。

    Attributes:
        old: 它自己训练时的数据，量忘了多少用；None = 没有，why_not 是理由。
    """

    folder: Path
    model: GPT2Config
    tokenizer: Tokenizer
    old: Path | None
    why_not: str = ""


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        said: 训练什么，冻结什么；new：新词元的 id。
        notes: 替用户做的选择。
    """

    config: TrainConfig
    data: Data
    said: Said
    new: range
    runtime: Runtime
    needed: int
    notes: tuple[str, ...]


def check_start(start: Start, context: int | None, trainable: str) -> GPT2Config:
    """缩短过的形状；点名的层与张量都在。

    Raises:
        ValueError: 上下文要变长，trainable 点名的不在，或要在适配器上再加适配器。
    """
    if trainable == "lora" and is_adapter(start.folder):
        raise ValueError(
            f"{start.folder} is an adapter, and an adapter on an adapter has no base of its own: "
            f"first gpt2 merge {start.folder} --out NEW, then fine-tune NEW; or use --trainable all"
        )
    shape = start.model if context is None else shrunk(start.model, context, str(start.folder))
    _said(shape, TuneConfig(trainable=trainable), range(0))
    return shape


def make_plan(
    start: Start, shape: GPT2Config, folder: Path, wish: Wish, room: Room, tell: Tell
) -> Plan:
    """folder：准备好的数据。

    Raises:
        ValueError: 数据不合模型或目标，设置不对，或放不下。
    """
    train = TokenDataset.open(folder / "train")
    if train.kind != "text":
        # 收尾从不计分的模板在这里就拒绝，不等训练完了才看出它不会停。
        train.template()
    new = new_tokens(start.tokenizer, train.tokenizer(), str(start.folder))
    shape = grown_config(shape, new.stop) if len(new) else shape
    sets, notes = _validation(start, folder)
    pack = train.kind in ("chat", "pairs") and shape.moe.capacity_factor is None
    data = DataConfig(folder=str(folder), val=sets, pack=pack, verify="size")
    config = first_settings(shape, str(start.folder), data, train.kind, wish)
    check_tune(config)
    opened = open_data(config, tell)
    wanted = config.batch_size
    config = with_batch(config, opened.feed.rows_in_epoch, wish)
    if config.batch_size < wanted:
        notes.append(
            f"{config.batch_size} rows a step instead of {wanted}: the data has only "
            f"{opened.feed.rows_in_epoch:,}"
        )
    feed = feed_of(train, config, config.batch_size, config.seed)
    config = with_lengths(config, feed, wish)
    said = _said(config.model, config.tune, new)
    runtime = choose_runtime(config)
    _check_others(config, train.tokenizer(), runtime)
    beside = Beside.of(config, new, tell)
    config = _fitting(config, runtime, beside, room, wish, notes)
    needed = room.needs(training_footprint(config, runtime, beside))
    # 核对内容的那一遍留给训练自己。
    config = config.replace(data=dataclasses.replace(config.data, verify="sha256"))
    opened = dataclasses.replace(opened, feed=feed)
    return Plan(config, opened, said, new, runtime, needed, tuple(notes))


def shaped(model: GPT2Model, plan: Plan) -> GPT2Model:
    """就地：起点的模型变成将要训练的那个，好拿来试走。"""
    fit_context(model, plan.config.model.context_size, str(plan.config.init_from))
    if len(plan.new):
        grow_vocabulary(model, len(plan.new), plan.new.start)
    apply_trainable(model, plan.config.tune, plan.new)
    return model


def _validation(start: Start, folder: Path) -> tuple[dict[str, str], list[str]]:
    """微调的数据决定 best；旧数据只量忘了多少。"""
    if not (folder / "val").is_dir():
        return {}, [f"neither the best step nor forgetting is measured: {folder} has no val part"]
    if start.old is None:
        return {TUNED: str(folder)}, [f"forgetting is not measured: {start.why_not}"]
    return {TUNED: str(folder), BEFORE: str(start.old)}, []


def _check_others(config: TrainConfig, tokenizer: Tokenizer, runtime: Runtime) -> None:
    """教师与参考现在就装一遍：训练里才拒绝的话，文件夹里已经有了东西。

    Raises:
        ValueError: 不能用。
    """
    build_objective(config, tokenizer, runtime, lambda line: None)
    if config.objective.reference != "auto":
        load_other(
            config.objective.reference, "objective.reference", config, tokenizer, lambda line: None
        )


def _fitting(
    config: TrainConfig, runtime: Runtime, beside: Beside, room: Room, wish: Wish, notes: list[str]
) -> TrainConfig:
    """微批放不下就减到放得下的；用户自己定的不动。

    Raises:
        ValueError: 一行也放不下。
    """
    rows, step = config.rows_at_once, 2 if config.objective.kind == "dpo" else 1
    if "micro_batch" not in wish.given:
        most = largest(
            lambda n: fits(config.replace(micro_batch=n * step), runtime, beside, room),
            rows // step,
        )
        if 0 < most * step < rows:
            config = config.replace(micro_batch=most * step)
            notes.append(f"{most * step} rows at once instead of {rows}: that is what fits")
    check_room(config, runtime, beside, room)
    return config


def _said(shape: GPT2Config, tune: TuneConfig, new: range) -> Said:
    """不占内存地数：模型在 meta 上。"""
    with torch.device("meta"):
        return apply_trainable(GPT2Model(shape), tune, new)

"""训练适配器时的检查点：适配器与它的优化器，没有原模型的权重。"""

from __future__ import annotations

from pathlib import Path

import torch

from app.adapters.adapter import Adapter
from app.adapters.files import Base, is_adapter, read_adapter, write_adapter, write_base
from app.adapters.load import find_base
from app.adapters.trainable import Said, apply_trainable
from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Model
from app.models.transformer.settings.tune_config import TuneConfig
from app.models.transformer.weights.own_folder import CONFIG_FILE
from app.models.transformer.weights.safetensors_file import write_tensors_file

from ..config import TrainConfig
from .checkpoint import resolve_checkpoint, step_folder
from .initial import Started, initialize_from
from .state import OPTIM, optimizer_tensors, read_optimizer


def check_tune(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: 没有可调的权重，或这种优化器、这种并行做不对。
    """
    tune, parallel = config.tune, config.parallel
    if tune.trainable == "all":
        return
    if config.init_from is None:
        raise ValueError(
            f"tune.trainable={tune.trainable} but init_from={config.init_from}: there are no "
            "trained weights to leave as they are; name the model with --init-from"
        )
    axes = ("shard", "tensor", "context", "expert", "pipeline")
    split = [f"parallel.{a}={n}" for a in axes if (n := getattr(parallel, a)) > 1]
    if split:
        raise ValueError(
            f"tune.trainable={tune.trainable} with {', '.join(split)}: what is frozen is not "
            "divided; use copies (parallel.shard and the others 1), or tune.trainable=all"
        )
    if tune.trainable == "lora" and config.optim.name == "muon":
        raise ValueError(
            f"tune.trainable=lora with optim.name={config.optim.name}: Muon makes whole matrices "
            "orthogonal, not the factors of one; use optim.name=adamw"
        )


def begin(
    config: TrainConfig, model: GPT2Model, started: Started | None
) -> tuple[Said, Base | None]:
    """冻结、换上适配器；原模型的记录（只有 lora 有）。"""
    new = range(0) if started is None else started.new
    said = apply_trainable(model, config.tune, new)
    if config.tune.trainable != "lora" or started is None:
        return said, None
    if is_adapter(started.folder):
        raise ValueError(
            f"init_from={started.folder} is an adapter, and an adapter on an adapter has no base "
            f"of its own: first gpt2 merge {started.folder} --out NEW, then --init-from NEW"
        )
    return said, Base.of(started.folder, step_folder(Path(config.out), 0))


def base_again(
    config: TrainConfig, start: Path, model: GPT2Model, tokenizer: Tokenizer
) -> Started | None:
    """续训时：检查点里没有原模型的权重，照 base.json 再装一次；不是适配器则不必。"""
    if not is_adapter(start):
        return None
    given = None
    if config.init_from is not None and Path(config.init_from).is_dir():
        given = resolve_checkpoint(config.init_from, lambda line: None)
    base = find_base(start, also=given)
    return initialize_from(str(base), model, tokenizer, lambda line: None)


def write_tuned(
    folder: Path, model: GPT2Model, optimizer: torch.optim.Optimizer, tune: TuneConfig, base: Base
) -> None:
    """
    Raises:
        OSError: 写不下。
    """
    write_adapter(Adapter.of(model), model.config, tune, folder)
    write_base(base, folder)
    (folder / CONFIG_FILE).write_text(model.config.to_json(), encoding="utf-8")
    write_tensors_file(optimizer_tensors(model, optimizer), folder / OPTIM)


def read_tuned(folder: Path, model: GPT2Model, optimizer: torch.optim.Optimizer) -> None:
    read_tuned_weights(folder, model)
    read_optimizer(folder, model, optimizer)


def read_tuned_weights(folder: Path, model: GPT2Model) -> None:
    read_adapter(folder, model.config).put_into(model)

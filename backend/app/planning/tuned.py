"""只训练一部分时谁占什么，和别的模型（教师、DPO 的参考）；在 meta 上数，不分配。

冻结的只有权重；训练的另有梯度与优化器的状态。最低的训练层之下没有图，也就不留激活。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from app.adapters.lora import LoraGroupedLinear, LoraLinear, loras
from app.adapters.rows import new_rows
from app.adapters.trainable import apply_trainable
from app.common.tell import Tell
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.tune_config import TuneConfig
from app.models.transformer.weights.recognise import config_from_file
from app.training.config import TrainConfig
from app.training.saving.checkpoint import resolve_checkpoint

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parts:
    """
    Attributes:
        what: 训练什么，一句英文。
        lowest: 反向走到哪一层为止；它以下的不留激活。
        adapters: {层: 适配器为每个词元另留的数}。
        has_rows: 词嵌入里只有新的行训练：整张由旧的与新的拼成，梯度先是整张的。
        trains_head: 输出头（或共享的词嵌入）训练。
    """

    trained: Shapes
    frozen: Shapes
    what: str
    lowest: int
    adapters: Mapping[int, int]
    has_rows: bool
    trains_head: bool


@dataclass(frozen=True)
class Beside:
    """训练的模型之外的。

    Attributes:
        new: 新词元的 id，lora 时各有自己的行。
        teacher: 蒸馏的教师，一直在内存里；reference: DPO 点名的参考，只在开始之前。
    """

    new: range = range(0)
    teacher: GPT2Config | None = None
    reference: GPT2Config | None = None

    def parts(self, config: TrainConfig) -> Parts | None:
        """None = 全部训练。"""
        tune = config.tune
        return None if tune.trainable == "all" else parts_of(config.model, tune, self.new)

    @classmethod
    def of(cls, config: TrainConfig, new: range, tell: Tell) -> Beside:
        """
        Raises:
            ValueError: 点名的模型不在那里。
        """
        objective, reference = config.objective, None
        if objective.kind == "dpo" and objective.reference != "auto":
            reference = _shape(objective.reference, tell)
        teacher = None if objective.teacher is None else _shape(objective.teacher, tell)
        return cls(new, teacher, reference)


ALONE = Beside()


@cache
def parts_of(shape: GPT2Config, tune: TuneConfig, new: range) -> Parts:
    """
    Raises:
        ValueError: tune 点名的不在这个形状里。
    """
    with torch.device("meta"):
        model = GPT2Model(shape)
        said = apply_trainable(model, tune, new)
    sides: tuple[dict[str, tuple[int, ...]], ...] = ({}, {})
    for name, parameter in model.named_parameters():
        sides[parameter.requires_grad][name] = tuple(parameter.shape)
    frozen, trained = sides
    head = "embed.wte" if model.lm_head is None else "lm_head"
    return Parts(
        trained, frozen, said.what, _lowest(trained, shape.n_layer), _adapters(model, tune),
        next(new_rows(model), None) is not None,
        any(name.startswith(f"{head}.") for name in trained),
    )  # fmt: skip


def _lowest(trained: Shapes, layers: int) -> int:
    if any(name.startswith("embed.") for name in trained):
        return 0
    return min((int(n.split(".")[1]) for n in trained if n.startswith("h.")), default=layers)


def _adapters(model: GPT2Model, tune: TuneConfig) -> dict[int, int]:
    """A·x 要留给 B 的梯度；有 dropout 时另有它的输出与噪声。专家里每个词元有 k 份。"""
    found: dict[int, int] = {}
    for name, leaf in loras(model):
        layer = int(name.split(".")[1])
        if isinstance(leaf, LoraGroupedLinear):
            saved = model.config.moe_top_k * tune.lora_rank
        else:
            assert isinstance(leaf, LoraLinear)
            saved = tune.lora_rank + (2 * leaf.in_features if tune.lora_dropout else 0)
        found[layer] = found.get(layer, 0) + saved
    return found


def _shape(folder: str, tell: Tell) -> GPT2Config:
    return config_from_file(resolve_checkpoint(folder, tell) / "config.json")

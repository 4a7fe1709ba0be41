"""专家平均成稠密，或剪去用得少的：先在数据上量，再给出权重与配置。

M 个 MoE 层、E 专家数。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.experts.upcycle import average, most_used, prune

from .evaluate import Meter
from .perplexity import HeldOut
from .routing import expert_load


@dataclass(frozen=True)
class Kept:
    """一层：各专家的词元数 (E,)，与留下的专家。"""

    load: list[int]
    experts: list[int]

    def share(self, expert: int) -> float:
        return self.load[expert] / max(1, sum(self.load))


@dataclass(frozen=True)
class Reduced:
    """改小的模型；layers 只在剪枝时有：{层: 留下了谁}。"""

    config: GPT2Config
    state: Mapping[str, Tensor]
    what: str
    layers: dict[int, Kept] = field(default_factory=dict)


def averaged(model: GPT2Model) -> Reduced:
    """
    Raises:
        ValueError: 没有专家，或专家的形状使平均没有意义。
    """
    config = model.config
    state = average(model.state_dict(), config)
    return Reduced(config.dense(), state, f"{config.moe_num_experts} experts averaged")


def pruned(
    model: GPT2Model,
    tokenizer: Tokenizer,
    held: HeldOut,
    keep: int | None,
    batch_size: int,
    meter: Meter,
) -> Reduced:
    """每层留下在 held 上用得最多的；keep 是个数，None 为用得最多的那一层所要的个数。

    Raises:
        ValueError: 一个也剪不掉，或 keep 越界。
    """
    with meter("routing", held.source.n_tokens) as advance:
        load = expert_load(model, tokenizer.boundary_id, held.source, batch_size, advance)
    chosen, before = most_used(load, model.config, keep), model.config.moe_num_experts
    state, config = prune(model.state_dict(), model.config, chosen)
    if config.moe_num_experts == before:
        raise ValueError(
            f"all {before} experts are in use in some layer on {held.name}: "
            f"nothing is pruned without loss; give --keep below {before}"
        )
    layers = {
        layer: Kept(row, kept)
        for row, (layer, kept) in zip(load.tolist(), chosen.items(), strict=True)
    }
    return Reduced(config, state, f"{config.moe_num_experts} of {before} experts kept", layers)

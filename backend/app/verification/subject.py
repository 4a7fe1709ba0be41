"""被核验的对象：一份配置，缩到双精度下算得动，缩了什么都说出来。"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from app.models.transformer import GPT2Config, GPT2Model, MoEConfig

# 双精度的检查要做几百次前向；更大的模型不会查出别的错，只会更慢。
MAX_PARAMETERS = 20_000_000
MAX_VOCAB = 4096
_MAX_CONTEXT = 256


@dataclass(frozen=True)
class Subject:
    """
    Attributes:
        asked: 用户的配置，原样；参数量在 meta 设备上按它核对。
        config: 实际计算的配置；dropout 至少 0.1，否则「评估时没有 dropout」无从查起。
        shrunk: 缩小了什么，如 "n_layer 48→2"；空串为原样。
    """

    asked: GPT2Config
    config: GPT2Config
    shrunk: str

    @classmethod
    def of(cls, asked: GPT2Config) -> Subject:
        config = _shrink(asked)
        names = (
            "vocab_size", "context_size", "n_layer", "n_head", "n_kv_head", "n_embed",
            "attention_pattern", "moe_layers", "expert_hidden",
        )  # fmt: skip
        changes = [
            f"{name} {getattr(asked, name)}→{getattr(config, name)}"
            for name in names
            if getattr(asked, name) != getattr(config, name)
        ]
        config = config.replace(dropout=max(config.dropout, 0.1))
        return cls(asked, config, ", ".join(changes))

    @cached_property
    def model(self) -> GPT2Model:
        """双精度、eval、种子固定；检查不得改动它的权重。"""
        return self.fresh()

    @cached_property
    def steady(self) -> GPT2Model:
        """同一个模型，给要求逐位相同的检查：有专家时每个专家算每个词元。

        别的分派里一个专家有几行要看其余的词元，矩阵乘换了形状，末位就可能不同。
        """
        if not self.config.moe_layers:
            return self.model
        return self.fresh(moe=dataclasses.replace(self.config.moe, dispatch="reference"))

    def fresh(self, **changes: object) -> GPT2Model:
        """同一种子的新模型；changes 覆盖配置里不改变权重的字段。"""
        torch.manual_seed(0)
        return GPT2Model(self.config.replace(**changes)).double().eval()

    def ids(self, rows: int, length: int, seed: int) -> torch.Tensor:
        """(rows, length) 的随机词元。"""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, (rows, length), generator=generator)

    def ids_like(self, ids: torch.Tensor, seed: int) -> torch.Tensor:
        return self.ids(ids.shape[0], ids.shape[1], seed)

    def length(self, wanted: int) -> int:
        return min(wanted, self.config.context_size)


def count_parameters(config: GPT2Config) -> int:
    """在 meta 设备上数，不分配内存。"""
    with torch.device("meta"):
        return GPT2Model(config).num_parameters()


def _shrink(config: GPT2Config) -> GPT2Config:
    """词表限在 4096；还太大则依次缩上下文、层数（不少于两层）、头数。头宽与分组不变。

    注意力图样一个不少：上下文不小于它们的窗口，层数不少于不同图样的个数。
    """
    small = config.replace(vocab_size=min(config.vocab_size, MAX_VOCAB))
    if _size(small) <= MAX_PARAMETERS:
        return small
    context = max(_MAX_CONTEXT, _widest(config), _room(config))
    small = small.replace(context_size=min(config.context_size, context))
    room = MAX_PARAMETERS - _count(small, 1)
    cycle = tuple(dict.fromkeys(config.patterns)) if config.attention_pattern else ()
    layers = min(config.n_layer, max(2, len(cycle), 1 + room // block_size(small)))
    if layers < config.n_layer:
        small = small.replace(attention_pattern=None, use_sparse_attention=False)
        small = small.with_layers(layers).replace(
            attention_pattern=cycle or None, use_sparse_attention=config.use_sparse_attention
        )
    group = config.n_head // config.kv_heads
    while _size(small) > MAX_PARAMETERS and small.n_head > group:
        heads = max(group, small.n_head // 2 // group * group)
        small = small.replace(
            n_head=heads,
            n_kv_head=None if config.n_kv_head is None else heads // group,
            n_embed=heads * config.head_dim,
            moe=_narrower(small.moe, small.n_head // heads),
        )
    return small


def _narrower(moe: MoEConfig, times: int) -> MoEConfig:
    """写明的专家宽度随模型的宽度缩。"""
    return dataclasses.replace(
        moe,
        hidden=None if moe.hidden is None else max(1, moe.hidden // times),
        shared_hidden=None if moe.shared_hidden is None else max(1, moe.shared_hidden // times),
    )


def _room(config: GPT2Config) -> int:
    """容量放得下一个词元要多长的上下文。"""
    factor = config.moe.capacity_factor
    if factor is None:
        return 1
    return math.ceil(config.moe_num_experts / (factor * config.moe_top_k))


def _widest(config: GPT2Config) -> int:
    """给出的图样要多长的上下文；默认图样自己随上下文缩。"""
    atoms = [atom for pattern in config.patterns for atom in pattern.atoms]
    if config.attention_pattern is None:
        return 1
    numbers = [value for atom in atoms for value in dataclasses.asdict(atom).values()]
    return max([1, *numbers, *(atom.reach or 0 for atom in atoms)])


def _size(config: GPT2Config) -> int:
    """参数量，不必造出全部层。"""
    return _count(config, 1) + block_size(config) * (config.n_layer - 1)


def block_size(config: GPT2Config) -> int:
    """一层的参数量，取第二层：keel 的第一层少一个归一化。"""
    return _count(config, 2) - _count(config, 1)


def _count(config: GPT2Config, layers: int) -> int:
    """换了层数的参数量，有专家就每层都有；图样没有参数，而循环可能比这几层长，所以拿掉。"""
    plain = config.replace(attention_pattern=None, use_sparse_attention=False)
    return count_parameters(plain.with_layers(layers, range(layers)))

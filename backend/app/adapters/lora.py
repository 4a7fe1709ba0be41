"""LoRA（Hu et al. 2021, arXiv:2106.09685）：y = W·x + (alpha/r)·B·A·x，只训练 A 与 B。

B 从 0 起，所以开始时与原模型逐位相同；A 照 PEFT 的 U(±1/sqrt(I))。q、k、v 拼成的 c_attn 只有一个
A，三者共用，B 的各行各归各的：这正是 PEFT 在 GPT-2 的 c_attn 上的形式，文件因此互通。
叶子从外面换掉，权重的名字不变；前向一行不改。R 行数、I 输入宽、O 输出宽、E 专家数、r 秩。
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from app.models.transformer import GPT2Model
from app.models.transformer.experts.grouped import GroupedLinear, sorted_linear
from app.models.transformer.layers.linear import Linear, linear
from app.models.transformer.settings.tune_config import TuneConfig

# 目标 -> 模块名字的末尾；叠起来的专家与共享专家也在 up、down 里。
TARGETS = {
    "qkv": ("attn.c_attn",),
    "out": ("attn.c_proj",),
    "up": ("mlp.c_fc", "experts.c_fc", "shared.c_fc"),
    "down": ("mlp.c_proj", "experts.c_proj", "shared.c_proj"),
}


class LoraLinear(Linear):
    """Linear 加一对 A (r, I)、B (O, r)；weight 与 bias 就是原来的那两个参数。"""

    def __init__(self, base: Linear, tune: TuneConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = _pair(base.weight, tune.lora_rank)
        self.dropout = nn.Dropout(tune.lora_dropout)
        self.scale = tune.lora_alpha / tune.lora_rank

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return y + self.scale * linear(linear(self.dropout(x), self.lora_A), self.lora_B)


class LoraGroupedLinear(GroupedLinear):
    """每个专家一对：A (E, r, I)、B (E, O, r)。"""

    def __init__(self, base: GroupedLinear, tune: TuneConfig) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = _pair(base.weight, tune.lora_rank)
        self.scale = tune.lora_alpha / tune.lora_rank

    def forward(self, x: Tensor, ends: Tensor, grouped: bool, complete: bool) -> Tensor:
        y = super().forward(x, ends, grouped, complete)
        # 秩很小，行往往不是 16 字节的倍数：分组的内核不收，这两次总逐个专家算。
        low = sorted_linear(x, self.lora_A, None, ends)
        return y + self.scale * sorted_linear(low, self.lora_B, None, ends)

    def of(self, expert: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().of(expert)
        return weight + self.scale * (self.lora_B[expert] @ self.lora_A[expert]), bias


Lora = LoraLinear | LoraGroupedLinear


def add_lora(model: GPT2Model, tune: TuneConfig) -> list[str]:
    """就地换叶子；原有的参数全部冻结。返回换了哪些模块，按次序。

    Raises:
        ValueError: 模型已有适配器，或叶子不是浮点的线性层，或专家带着 dropout。
    """
    if next(loras(model), None) is not None:
        raise ValueError("the model already has adapters: merge them first (gpt2 merge)")
    ends = tuple(f".{end}" for target in tune.lora_targets for end in TARGETS[target])
    found = [(n, m) for n, m in model.named_modules() if n.endswith(ends)]
    for name, leaf in found:
        if type(leaf) not in (Linear, GroupedLinear):
            raise ValueError(
                f"{name} is {type(leaf).__name__}, not a float layer: adapters need the float "
                "model that it was made from"
            )
        if isinstance(leaf, GroupedLinear) and tune.lora_dropout:
            raise ValueError(
                f"tune.lora_dropout={tune.lora_dropout} but {name} holds stacked experts, "
                "for which PEFT has no dropout: use tune.lora_dropout=0, or tune.lora_targets "
                "without up and down"
            )
    model.requires_grad_(False)
    for name, leaf in found:
        parent, _, last = name.rpartition(".")
        kind = LoraLinear if isinstance(leaf, Linear) else LoraGroupedLinear
        setattr(model.get_submodule(parent), last, kind(leaf, tune).train(leaf.training))
    return [name for name, _ in found]


def loras(model: nn.Module) -> Iterator[tuple[str, Lora]]:
    """(模块名, 换上的叶子)。"""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | LoraGroupedLinear):
            yield name, module


def _pair(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """(A, B)，前面的专家维照旧。"""
    *stack, rows, width = weight.shape
    bound = 1 / math.sqrt(width)
    a = weight.new_empty(*stack, rank, width).uniform_(-bound, bound)
    return nn.Parameter(a), nn.Parameter(weight.new_zeros(*stack, rows, rank))

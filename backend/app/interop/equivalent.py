"""换一种写法而函数不变：别的运行时只认得几种形状，能改写成它们的就改写，并说出改了什么。

全部作用于 {名字: 张量} 与配置，返回新的，不动原来的。V 词表、C 宽度、N 层数。
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.block import residuals
from app.models.transformer.weights.layouts import HEAD

WTE, WPE = "embed.wte.weight", "embed.wpe.weight"


@dataclass(frozen=True)
class Weights:
    """配置与权重；notes 是已做的改写，每条一句英文。"""

    config: GPT2Config
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: GPT2Model) -> Weights:
        if model.device.type == "meta":
            raise ValueError("the model is on the meta device and has no weights to export")
        state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        return cls(model.config, state)

    def to(self, dtype: torch.dtype | None) -> Weights:
        """换精度，在一切改写之后：先舍入再折叠会舍入两次。None = 不换。"""
        if dtype is None:
            return self
        return replace(self, state={k: v.to(dtype) for k, v in self.state.items()})

    def changed(self, config: GPT2Config, state: dict[str, Tensor], note: str) -> Weights:
        return Weights(config, {**self.state, **state}, (*self.notes, note))


def with_biases(weights: Weights) -> Weights:
    """bias=False 就是偏置恒为零：补上零，给只认得有偏置的运行时。"""
    if weights.config.bias:
        return weights
    zeros = {}
    for name, tensor in weights.state.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and name != HEAD and not name.startswith("embed."):
            zeros[f"{stem}.bias"] = tensor.new_zeros(tensor.shape[0])
    return weights.changed(
        weights.config.replace(bias=True), zeros, "biases of zero were added (bias=False)"
    )


def as_post(weights: Weights) -> Weights:
    """deepnorm 写成 post：LN(α·x + F(x)) 里的 α 折进权重，除舍入外处处相等。

    让残差流里流的是 x' = α·x：嵌入与各个 LayerNorm 的输出乘 α，分支的第一个矩阵除 α，
    于是 x' + F(x'/α) 就是 α·x + F(x)，连 LayerNorm 里的 ε 也照旧。最后一个 LayerNorm 之后
    没有残差：输出头与嵌入共享时它除 α，抵消嵌入里多出的 α；不共享时不动。
    把 1/α 折进分支出口的写法（F(x)/α）也说得通，但 ε 相对变大，误差大得多，
    见 docs/decisions/011-interop.md。
    """
    config = weights.config
    if config.norm == "post":
        return weights
    alpha = residuals(config, 0)[0].alpha
    scale = {WTE: alpha, WPE: alpha}
    for i in range(config.n_layer):
        for name, factor in (
            ("attn.c_attn.weight", 1 / alpha),
            ("mlp.c_fc.weight", 1 / alpha),
            *((f"ln_{n}.{kind}", alpha) for n in (1, 2) for kind in ("weight", "bias")),
        ):
            scale[f"h.{i}.{name}"] = factor
    last = 1 / alpha if config.tie_weights else 1.0
    for kind in ("weight", "bias"):
        scale[f"h.{config.n_layer - 1}.ln_2.{kind}"] = last
    scaled = {
        name: (weights.state[name].double() * factor).to(weights.state[name].dtype)
        for name, factor in scale.items()
        if name in weights.state
    }
    note = f"the residual scale of deepnorm, {alpha:.6f}, was folded into the weights"
    return weights.changed(config.replace(norm="post"), scaled, note)


def widened(weights: Weights, vocab_size: int) -> Weights:
    """词表末尾补行。补的是各行的平均，不是零：零行的 logit 是 0，而真词元的常在 -100 左右。

    平均行的 logit 是真词元 logits 的平均：贪心永远不会选中它，而且由 Jensen 不等式，
    它的概率不超过 1/V。
    """
    config = weights.config
    rows = vocab_size - config.vocab_size
    if rows == 0:
        return weights
    grown = {}
    for name in (WTE, HEAD):
        if name in weights.state:
            table = weights.state[name]
            mean = table.double().mean(0, keepdim=True).to(table.dtype)
            grown[name] = torch.cat([table, mean.expand(rows, -1)])
    note = f"{rows} rows were added to the vocabulary, each the mean of the trained ones"
    return weights.changed(config.replace(vocab_size=vocab_size), grown, note)

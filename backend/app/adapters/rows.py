"""词表里的新词元：增长，以及只训练新的那几行。

新行是旧行的平均：平均的 logit 不超过 logsumexp - ln V（Jensen），所以加 n 行时旧词元的对数概率至多
低 ln(1 + n/V)。各行相同无妨，它们的梯度不同。V 词表、C 宽度、n 新行数。
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.embeddings import Embedding
from app.models.transformer.layers.linear import Linear, linear

# 词表补齐到它的倍数，矩阵乘才快（nanoGPT 的 50257 -> 50304 同此）。
MULTIPLE = 64
VOCABULARY = ("embed.wte", "lm_head")


def grown_size(size: int, ids: int) -> int:
    """装得下 ids 个词元的词表：先用补齐的行，不够才按 64 的倍数长。"""
    return size if ids <= size else -(-ids // MULTIPLE) * MULTIPLE


@torch.no_grad()
def grow_vocabulary(model: GPT2Model, count: int, used: int | None = None) -> range:
    """就地添 count 个词元，返回它们的 id；新行是前 used 行的平均，旧行一位不动。

    Args:
        used: 分词器已用的行数，其后是补齐的；None = 没有补齐的行。

    Raises:
        ValueError: count 不是正的，used 超出词表，或权重不是浮点的。
    """
    size = model.config.vocab_size
    used = size if used is None else used
    if count < 1 or not 0 < used <= size:
        raise ValueError(f"count={count} must be above 0 and used={used} between 1 and {size}")
    new = range(used, used + count)
    wanted = grown_size(size, new.stop)
    for _, leaf in vocabulary_leaves(model):
        _grow(leaf, used, new.stop, wanted)
    model.config = model.config.replace(vocab_size=wanted)
    return new


def vocabulary_leaves(model: GPT2Model) -> Iterator[tuple[str, Embedding | Linear]]:
    """词嵌入，与不共享的输出头。

    Raises:
        ValueError: 不是浮点的叶子（量化的）。
    """
    for name in VOCABULARY:
        if name == "lm_head" and model.lm_head is None:
            continue
        leaf = model.get_submodule(name)
        if type(leaf) not in (Embedding, Linear):
            raise ValueError(
                f"{name} is {type(leaf).__name__}: new tokens need the float model that it was "
                "made from"
            )
        yield name, leaf  # type: ignore[misc]


def _grow(leaf: Embedding | Linear, used: int, stop: int, wanted: int) -> None:
    old = leaf.weight
    mean = old[:used].double().mean(0).to(old.dtype)
    weight = torch.cat([old, mean.expand(wanted - len(old), -1)])
    weight[used:stop] = mean
    leaf.weight = nn.Parameter(weight, old.requires_grad)
    if isinstance(leaf, Embedding):
        leaf.num_embeddings = wanted
    else:
        leaf.out_features = wanted


class NewRows(nn.Module):
    """weight 的 first 起的 n 行换成另一个参数 rows，只有它训练；别的行连权重衰减也碰不到。

    冻结的整张仍叫 weight，检查点里的名字才不变；所以它只在 _parameters 里，属性是拼好的那一张。
    """

    def __init__(self, base: nn.Module, new: range) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, nn.Parameter)
        self.first = new.start
        self._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
        self.rows = nn.Parameter(weight.detach()[new.start : new.stop].clone())

    @property
    def weight(self) -> Tensor:
        """(V, C)。"""
        whole = self._parameters["weight"]
        assert whole is not None
        after = self.first + len(self.rows)
        return torch.cat([whole[: self.first], self.rows, whole[after:]])

    @property
    def num_embeddings(self) -> int:
        whole = self._parameters["weight"]
        assert whole is not None
        return len(whole)


class NewRowsEmbedding(NewRows):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class NewRowsLinear(NewRows):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def train_new_rows(model: GPT2Model, new: range) -> None:
    """就地：词嵌入与（不共享的）输出头里，只有 new 的各行训练。"""
    for name, leaf in list(vocabulary_leaves(model)):
        parent, _, last = name.rpartition(".")
        kind = NewRowsEmbedding if isinstance(leaf, Embedding) else NewRowsLinear
        setattr(model.get_submodule(parent), last, kind(leaf, new))


def new_rows(model: nn.Module) -> Iterator[tuple[str, NewRows]]:
    for name, module in model.named_modules():
        if isinstance(module, NewRows):
            yield name, module


def grown_config(config: GPT2Config, ids: int) -> GPT2Config:
    return config.replace(vocab_size=grown_size(config.vocab_size, ids))

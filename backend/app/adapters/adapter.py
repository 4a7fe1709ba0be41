"""一套适配器：各模块的 A、B 与新词元的行；从模型里取出，或并进权重。

I 输入宽、O 输出宽、E 专家数、r 秩、C 宽度、n 新词元数。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.weights.own_folder import assemble

from .lora import loras
from .rows import grow_vocabulary, new_rows, vocabulary_leaves


@dataclass(frozen=True)
class Adapter:
    """
    Attributes:
        pairs: {模块: (A (r, I), B (O, r))}；叠起来的专家前面多一维 E。
        scale: alpha / r。
        new, rows: 新词元的 id，与 {模块: 它们的行 (n, C)}；没有则空。
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    new: range = range(0)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: GPT2Model) -> Adapter:
        """
        Raises:
            ValueError: 模型没有适配器。
        """
        pairs = {name: (leaf.lora_A.detach(), leaf.lora_B.detach()) for name, leaf in loras(model)}
        if not pairs:
            raise ValueError("the model has no adapters: it is saved whole (save_pretrained)")
        scale = next(leaf.scale for _, leaf in loras(model))
        rows: dict[str, Tensor] = {}
        new = range(0)
        for name, leaf in new_rows(model):
            rows[name] = leaf.rows.detach()
            new = range(leaf.first, leaf.first + len(leaf.rows))
        return cls(pairs, scale, new, rows)

    @torch.no_grad()
    def put_into(self, model: GPT2Model) -> None:
        """放回带着同样适配器的模型（续训）。

        Raises:
            ValueError: 它的适配器在别的层上，或新词元不同。
        """
        leaves, grown = dict(loras(model)), dict(new_rows(model))
        if leaves.keys() != self.pairs.keys() or grown.keys() != self.rows.keys():
            here, there = sorted(leaves), sorted(self.pairs)
            raise ValueError(
                f"the model has adapters on {len(here)} layers {here[:2]} but the file on "
                f"{len(there)} {there[:2]}: resume with the settings it was trained with"
            )
        for name, (a, b) in self.pairs.items():
            leaves[name].lora_A.copy_(a)
            leaves[name].lora_B.copy_(b)
        for name, rows in self.rows.items():
            grown[name].rows.copy_(rows)

    @torch.no_grad()
    def merge_into(self, model: GPT2Model) -> None:
        """就地：W + scale·B·A，至少在 float32 里加，再回到 W 的精度：bf16 里加会丢掉小的更新。

        model 是原模型，还没有长过新词元；装得下它们时只写给了的行：PEFT 可以只训练嵌入，头就不动。

        Raises:
            ValueError: 装不下，而要长的叶子里有一个没有给它的行。
        """
        for name, (a, b) in self.pairs.items():
            leaf = model.get_submodule(name)
            weight = leaf.weight
            assert isinstance(weight, Tensor)
            wide = torch.promote_types(weight.dtype, torch.float32)
            a, b = (x.to(weight.device, wide) for x in (a, b))
            weight.copy_(weight.to(wide) + self.scale * (b @ a))
        if self.new.stop > (size := model.config.vocab_size):
            if lacking := [n for n, _ in vocabulary_leaves(model) if n not in self.rows]:
                raise ValueError(
                    f"the adapter's tokens end at {self.new.stop} but the base has vocab_size="
                    f"{size} and there are no rows for {lacking[0]}: train them for embedding and "
                    "head together, or merge into a base that has the tokens"
                )
            grow_vocabulary(model, len(self.new), self.new.start)
        for name, rows in self.rows.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight[self.new.start : self.new.stop] = rows.to(weight)


def merged(model: GPT2Model) -> GPT2Model:
    """带适配器的模型 -> 普通的一个，各自的权重。"""
    state = {name: x.clone() for name, x in base_state(model).items()}
    plain = assemble(GPT2Model, model.config, state.items(), model.device, None)
    Adapter.of(model).merge_into(plain)
    return plain


def base_state(model: GPT2Model) -> dict[str, Tensor]:
    """原模型的权重；不复制。"""
    added = (".lora_A", ".lora_B", ".rows")
    return {name: x for name, x in model.state_dict().items() if not name.endswith(added)}

"""量化的模型：同一个主干，矩阵的叶子从外面换成码，前向一行不改。

C 宽度、V 词表、E 专家数。
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.experts.dispatch import group
from app.models.transformer.experts.grouped import GroupedLinear
from app.models.transformer.experts.moe import Experts
from app.models.transformer.layers.linear import Linear
from app.models.transformer.layers.loss import CHUNK_BYTES, IGNORE
from app.models.transformer.weights.own_folder import expected_shapes

from .codes import Codes, Scheme
from .layers import QuantizedEmbedding, QuantizedGroupedLinear, QuantizedLinear
from .matrix import QuantizedMatrix, QuantizedStack
from .stored import save_quantized

WTE, HEAD = "embed.wte.weight", "lm_head.weight"
# 查表与输出头决定质量，也最大；它们另有位数。
VOCABULARY = (WTE, HEAD)
_MATRIX = re.compile(r"(^embed\.wte|^lm_head|\.c_attn|\.c_proj|\.c_fc)\.weight$")
_TRAIN = (
    "quantized weights have no gradient: train the float model they were made from, and quantize "
    "it again"
)


def matrices(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """要量化的矩阵：{名字: (..., O, I)}。归一化、位置、偏置与路由器不在其中。"""
    return {
        n: shape for n, shape in expected_shapes(GPT2Model, config).items() if _MATRIX.search(n)
    }


class QuantizedModel(GPT2Model):
    """生成、打分、画图与 GPT2Model 一样用；训练、换精度则带着理由拒绝。

    Attributes:
        schemes: {矩阵的名字: 它怎样存}，恰为 matrices(config) 的那些。
        method: 码是怎么来的，给人看。
    """

    def __init__(self, config: GPT2Config, codes: Mapping[str, Codes], method: str) -> None:
        """浮点的叶子仍在 meta 设备上，由 load_state_dict(assign=True) 装入。"""
        with torch.device("meta"):
            super().__init__(config)
        self.method = method
        self._shapes = matrices(config)
        swap(self, codes)
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def of(cls, model: GPT2Model, codes: Mapping[str, Codes], method: str) -> Self:
        """浮点的模型换上码；浮点的叶子是 float32 的一份（已是的就共用）。"""
        made = cls(model.config, codes, method)
        floats = model.state_dict()
        state = {name: t.detach().float() for name, t in floats.items() if name not in codes}
        for name, each in codes.items():
            state |= {f"{name}.{kind}": tensor for kind, tensor in each.tensors().items()}
        made.load_state_dict(state, assign=True)
        return made

    @property
    def codes(self) -> dict[str, Codes]:
        """{矩阵的名字: 码}；不复制。"""
        return {name: _codes_of(self, name) for name in self._shapes}

    @property
    def schemes(self) -> dict[str, Scheme]:
        return {name: each.scheme for name, each in self.codes.items()}

    def head(self, x: Tensor) -> Tensor:
        matrix = self.get_submodule(WTE if self.lm_head is None else HEAD)
        assert isinstance(matrix, QuantizedMatrix)
        return matrix.product(x)

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """同一个平均交叉熵，一块一块地算，没有梯度。"""
        flat, labels = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        size = max(1, CHUNK_BYTES // (self.config.vocab_size * 4))
        total = flat.new_zeros(())
        for rows, wanted in zip(flat.split(size), labels.split(size), strict=True):
            total += F.cross_entropy(self.head(rows), wanted, ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp(min=1)

    @property
    def head_weight(self) -> Tensor:
        raise ValueError(
            "a quantized model has no float head weight: use model.head(x) for the logits, or "
            "dequantize(model) for float weights"
        )

    def num_parameters(self) -> int:
        floats = sum(p.numel() for p in self.parameters())
        return floats + sum(math.prod(shape) for shape in self._shapes.values())

    def active_parameters(self) -> int:
        idle = 1 - self.config.moe_top_k / max(1, self.config.moe_num_experts)
        stacked = sum(
            math.prod(shape) for name, shape in self._shapes.items() if ".experts." in name
        )
        biases = sum(
            m.bias.numel()
            for m in self.modules()
            if isinstance(m, QuantizedGroupedLinear) and m.bias is not None
        )
        return self.num_parameters() - round(idle * (stacked + biases))

    def describe(self) -> str:
        """一行：各种存法各有几个矩阵，怎么来的。"""
        kinds = Counter(scheme.label() for scheme in self.schemes.values())
        return ", ".join(f"{kind} x{count}" for kind, count in kinds.items()) + f"; {self.method}"

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def save_pretrained(self, folder: str | Path) -> None:
        save_quantized(self, Path(folder))

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError(_TRAIN)
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """.to(device) 可以；换精度会毁掉码的含义，一个叶子也不动就拒绝。"""
        for dtype in (torch.float16, torch.float32):
            got = fn(torch.zeros((), dtype=dtype)).dtype
            if got != dtype:
                raise ValueError(
                    f"cannot cast a quantized model to {got}: its codes and scales are stored as "
                    "they are; dequantize(model).to(dtype) gives a float model"
                )
        return super()._apply(fn, recurse)


class QuantizedExperts(nn.Module):
    """Experts 的推理：行按专家排好，每个专家乘自己的码。"""

    def __init__(
        self, count: int, c_fc: QuantizedGroupedLinear, c_proj: QuantizedGroupedLinear,
        activation: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        self.count, self.c_fc, self.c_proj, self.activation = count, c_fc, c_proj, activation

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor, complete: bool = False) -> Tensor:
        """见 Experts.forward：x (N, C)、expert (N, k)、weight (N, k) -> (N, C)。"""
        if len(x) == 1 and complete:
            return self._one(x, expert[0].tolist(), weight)
        groups = group(expert, self.count, complete)
        rows = self.activation(self.c_fc(x.index_select(0, groups.token), groups.ends))
        rows = self.c_proj(rows, groups.ends)
        back = rows.index_select(0, groups.row).view(*weight.shape, -1)
        return torch.bmm(weight[:, None].to(back.dtype), back).squeeze(1)

    def _one(self, x: Tensor, chosen: list[int], weight: Tensor) -> Tensor:
        """解码的一步：不排序，逐个专家算。"""
        rows = [self.c_proj.one(e, self.activation(self.c_fc.one(e, x))) for e in chosen]
        return torch.bmm(weight[:, None].to(x.dtype), torch.stack(rows, 1)).squeeze(1)


def swap(model: nn.Module, codes: Mapping[str, Codes]) -> None:
    """按名字把叶子换成码，偏置留下；专家连同它们的前向一起换。

    Raises:
        ValueError: 名字不是能换的叶子。
    """
    for name, each in codes.items():
        path = name.removesuffix(".weight")
        leaf = model.get_submodule(path)
        _put(model, path, _quantized(leaf, each, name))
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            c_fc, c_proj = module.c_fc, module.c_proj
            if not isinstance(c_fc, QuantizedGroupedLinear) or not isinstance(
                c_proj, QuantizedGroupedLinear
            ):
                raise ValueError(f"{path} has float matrices left: quantize both or neither")
            _put(model, path, QuantizedExperts(module.count, c_fc, c_proj, module.activation))


def _quantized(leaf: nn.Module, codes: Codes, name: str) -> nn.Module:
    if isinstance(leaf, Linear):
        return QuantizedLinear(codes, leaf.bias)
    if isinstance(leaf, GroupedLinear):
        return QuantizedGroupedLinear(codes, leaf.bias)
    if isinstance(leaf, nn.Embedding):
        return QuantizedEmbedding(codes)
    raise ValueError(f"{name} is in a {type(leaf).__name__}, which has no quantized form")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, module)


def _codes_of(model: nn.Module, name: str) -> Codes:
    matrix = model.get_submodule(name)
    assert isinstance(matrix, QuantizedMatrix | QuantizedStack)
    return Codes(matrix.bits, matrix.codes, matrix.scale, matrix.minimum, matrix.group)


def dequantize(model: QuantizedModel) -> GPT2Model:
    """同样的值、float32 的普通模型：导出与换精度由它开始。"""
    codes = model.codes
    stored = {f"{name}.{kind}" for name, each in codes.items() for kind in each.tensors()}
    state = {name: t for name, t in model.state_dict().items() if name not in stored}
    state |= {name: each.dequantize() for name, each in codes.items()}
    with torch.device("meta"):
        made = GPT2Model(model.config)
    made.load_state_dict(state, assign=True)
    return made.eval()


def check_float(model: GPT2Model, what: str) -> None:
    """
    Raises:
        ValueError: 模型是量化的，而 what 要浮点的权重。
    """
    if isinstance(model, QuantizedModel):
        raise ValueError(
            f"{what} needs float weights, but this model is quantized ({model.describe()}): use "
            "the float model it was made from, and quantize the result again"
        )

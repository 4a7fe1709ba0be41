"""量化的模型作为 transformers 的模型：generate、pipeline 照用；训练与另存则带着理由拒绝。"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from app.quantization.layers import QuantizedEmbedding
from app.quantization.matrix import QuantizedMatrix
from app.quantization.model import HEAD, QuantizedModel, swap

from .configuration_workbench import WorkbenchConfig
from .modeling_workbench import WorkbenchForCausalLM


class QuantizedForCausalLM(WorkbenchForCausalLM):
    """由 wrap 造；码与原来的模型是同一些张量。"""

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """头与嵌入本来就是同一个矩阵。"""

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError(
                "quantized weights have no gradient: wrap the float model to train it, and "
                "quantize the result"
            )
        return super().train(False)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise ValueError(
            "transformers has no place for these codes: save the GPT2Model itself "
            "(model.save_pretrained), or wrap(dequantize(model)) for float weights"
        )


class _Head(nn.Module):
    """共享的输出头：嵌入的那个矩阵，没有第二份。"""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.weight = matrix

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V)。"""
        return self.weight.product(x)


def wrap_quantized(model: QuantizedModel, **options: Any) -> QuantizedForCausalLM:
    """见 convert.wrap。"""
    with torch.device("meta"):
        wrapped = QuantizedForCausalLM(WorkbenchConfig(**model.config.to_dict(), **options))
    codes = model.codes
    inner = {name: each for name, each in codes.items() if name != HEAD}
    swap(wrapped.model, inner)
    if HEAD in codes:
        swap(wrapped, {HEAD: codes[HEAD]})
    else:
        embedding = wrapped.get_input_embeddings()
        assert isinstance(embedding, QuantizedEmbedding)
        wrapped.lm_head = _Head(embedding.weight)
    state = model.state_dict()
    own = {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in state.items()}
    if HEAD not in codes:
        own |= {
            f"lm_head.weight.{kind}": t for kind, t in codes["embed.wte.weight"].tensors().items()
        }
    wrapped.load_state_dict(own, assign=True)
    return wrapped.requires_grad_(False).eval()

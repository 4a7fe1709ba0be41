"""几个词元的一步整个交给原生的文件：稠密的模型，浮点或量化的权重。

省下的是逐层的 Python、算子的启动与线程的集合；孪生是 lean_step.py 里逐个算子的一步。
一行是一个词元，同一段文字接着的几个词元是几行。行数到 MOST_ROWS 为止，一行的结果与同批的行、
线程数无关，逐位相同。
B 行、C 宽度、V 词表、S 键数、D 头宽、K 要 logits 的行数。
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model, KVCache
from app.models.transformer.block import Block, Residual
from app.models.transformer.cache.store import Store
from app.models.transformer.config import Activation
from app.models.transformer.layers.linear import Linear
from app.models.transformer.layers.norm import RMSNorm
from app.models.transformer.layers.rope import Rotary
from app.models.transformer.mlp import MLP
from app.native.build import load_native
from app.native.structs import (
    INT4,
    INT8,
    Held,
    Layer,
    Matrix,
    Model,
    NativeSource,
    Norm,
    float_weight,
    pointer,
)

# 再多，浮点的乘法是 torch 的快。
MOST_ROWS = 32
_ACTIVATIONS: dict[Activation, int] = {
    "gelu_tanh": 0, "gelu": 1, "relu": 2, "relu2": 3, "silu": 4, "swiglu": 4,
}  # fmt: skip
_MATRICES = ("c_attn", "c_proj", "c_fc")
_PLAIN = (nn.LayerNorm, RMSNorm)
_NORMS = ("ln_1", "ln_1_post", "ln_2", "ln_2_post", "ln_f", "q_norm", "k_norm")


def why_not_native(model: GPT2Model) -> str | None:
    """这个模型的一步不能整个交出去的理由；None = 可以。"""
    config, found = model.config, load_native()
    if found.handle is None:
        return found.reason
    if config.moe_layers:
        return f"layers {list(config.moe_layers)} have experts"
    if config.attention_backend not in ("auto", "sdpa"):
        return f"attention_backend={config.attention_backend!r}"
    # 换掉的叶子（如 LoRA 包着的）自己的前向没有人读；它起初是零的话，头一步也比不出来。
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        known = type(module) is Linear or isinstance(module._modules.get("weight"), NativeSource)
        if (leaf in _MATRICES and not known) or (leaf in _NORMS and type(module) not in _PLAIN):
            return f"{name} is a {type(module).__name__}"
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return f"{name} is {tensor.dtype}, strides {tensor.stride()}"
    for name, module in model.named_modules():
        if isinstance(module, NativeSource) and module.native_weight() is None:
            return f"{name} is multiplied by another kernel"
    return None


class NativeStep:
    """model 的一步；权重就是模型的，不复制。

    Attributes:
        tolerance: 与前向的 logits 至多差最大的 logit 的这么多倍。浮点约差 1e-6；8、4 位的激活取整
            成 16 位，入口差一个舍入，几层之后就差到取整本身的误差，约 3e-4。
    """

    def __init__(self, model: GPT2Model) -> None:
        config, self._kept = model.config, list[object]()
        self._solid = min(pattern.solid for pattern in model.patterns)
        self._vocab = config.vocab_size
        self._layers = (Layer * config.n_layer)(
            *(self._block(cast(Block, block)) for block in model.h.values())
        )
        head = model.embed.wte if model.lm_head is None else model.lm_head
        self._model = Model(
            config.n_layer, config.n_embed, config.n_head, config.kv_heads, config.head_dim,
            config.mlp_hidden, _ACTIVATIONS[config.activation], config.is_gated, _side(config),
            self._norm(model.ln_f), self._matrix(head.weight, None), self._layers,
        )  # fmt: skip
        self._config, self._turns = config, torch.empty(2, 0, config.head_dim // 2)
        codes = [held for held in self._kept if isinstance(held, Held)]
        rounded = any(held.weight.kind in (INT8, INT4) for held in codes)
        self.tolerance = 1e-2 if rounded else 1e-4
        handle = load_native().handle
        assert handle is not None
        self._call = handle.gpt2_step

    def takes(self, rows: int, cache: KVCache) -> bool:
        """缓存里的键值按到达的次序、全都看得见，而且是 float32。"""
        start = cache.uniform
        return start is not None and self.takes_rows(rows, start + 1, cache.stores)

    def takes_rows(self, rows: int, keys: int, stores: Sequence[tuple[Store, Store]]) -> bool:
        """rows 行，各至多 keys 个键（含这个词元）：都在自己的槽里，全看得见，是 float32。"""
        if rows > MOST_ROWS or keys > self._solid:
            return False
        return all(
            type(one) is Store and one.dtype == torch.float32 and keys < one.parts[0].shape[2]
            for one, _ in stores
        )

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """嵌入 (B, C)，会被改写 -> logits (B, V)；键值写进缓存的下一槽。

        Raises:
            MemoryError: 中间结果放不下。
        """
        assert cache.uniform is not None
        every = range(len(x))
        return self.rows(x, [cache.uniform + 1] * len(x), every, cache.stores, every)

    def rows(
        self,
        x: Tensor,
        keys: Sequence[int],
        places: Sequence[int],
        stores: Sequence[tuple[Store, Store]],
        keep: Sequence[int],
    ) -> Tensor:
        """同上，各行有自己的键数（含这一个词元），在缓存的第 places 行；给出 keep 这几行的 (K, V)。

        同一段文字接着的几个词元：places 相同，keys 一个比一个多一。

        Raises:
            MemoryError: 中间结果放不下。
        """
        assert x.is_contiguous() and x.dtype == torch.float32
        for layer, (k, v) in zip(self._layers, stores, strict=True):
            layer.keys, layer.values = pointer(k.parts[0]), pointer(v.parts[0])
            layer.row_stride, layer.head_stride = k.parts[0].stride(0), k.parts[0].stride(1)
        cosine, sine = self._turned(keys) if self._model.side else (None, None)
        logits = x.new_empty(len(keep), self._vocab)
        failed = self._call(
            ctypes.byref(self._model), len(x), _ints(keys), _ints(places), pointer(cosine),
            pointer(sine), x.data_ptr(), len(keep), _ints(keep), logits.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for one step of {len(x)} rows")
        return logits

    def _turned(self, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """键数 -> 那些位置的 cos 与 sin，各 (B, D/2)；用到多远，表就算到两倍远。"""
        if max(keys) > self._turns.shape[1]:
            config, far = self._config, torch.arange(2 * max(keys))[None]
            made = Rotary.at(far, config.rope, config.head_dim, config.context_size)
            self._turns = torch.stack((made.cos[0, 0], made.sin[0, 0]))
        cosine, sine = self._turns[:, torch.tensor(keys) - 1]
        return cosine, sine

    def _block(self, block: Block) -> Layer:
        first, second = block.residuals
        mlp = cast(MLP, block.mlp)
        return Layer(
            *self._around(first, block.ln_1, block.ln_1_post),
            *self._around(second, block.ln_2, block.ln_2_post),
            *(self._norm(norm) for norm in (block.attn.q_norm, block.attn.k_norm)),
            *(
                self._matrix(leaf.weight, leaf.bias)
                for leaf in (block.attn.c_attn, block.attn.c_proj, mlp.c_fc, mlp.c_proj)
            ),
            first.alpha, second.alpha,
        )  # fmt: skip

    def _around(self, kind: Residual, norm: nn.Module, post: nn.Module | None) -> tuple[Norm, Norm]:
        """(内侧, 外侧)，见 block.py。"""
        outer = (norm if post is None else post) if kind.outer else None
        return self._norm(norm if kind.inner else None), self._norm(outer)

    def _norm(self, norm: nn.Module | None) -> Norm:
        if norm is None:
            return Norm(None, None, 0.0, 0)
        centered = isinstance(norm, nn.LayerNorm)
        gain, shift = cast(Tensor, norm.weight), getattr(norm, "bias", None)
        self._kept += [gain, shift]
        return Norm(pointer(gain), pointer(shift), cast(float, norm.eps), centered)

    def _matrix(self, weight: Tensor | NativeSource, bias: Tensor | None) -> Matrix:
        held = float_weight(weight) if isinstance(weight, Tensor) else weight.native_weight()
        assert isinstance(held, Held)
        self._kept += [held, bias]
        return Matrix(held.address, pointer(bias))


def _side(config: GPT2Config) -> int:
    """旋转的一对里两维的号差几；0 = 不转。"""
    if config.position != "rope":
        return 0
    return config.head_dim // 2 if config.rope.layout == "half" else 1


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)

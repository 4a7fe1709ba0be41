"""每行一个词元的前向，去掉逐层逐词元的杂务：没有模块调用、丢弃层、转置与检查。

两条路：标准的稠密模型整步交给原生的文件（native_step.py），与前向只差舍入；其余的逐个算子
地走，算子与 GPT2Model.forward 相同、次序相同，所以逐位相同，省下的只是 Python。
坐标与缓存总是主干自己的，掩码计划也是，于是图样、环、int8 的键值、旋转都照旧。
B 行、C 宽度、H 查询头数、G 键值头数、D 头宽。
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.generation.native_step import NativeStep, why_not_native
from app.models.transformer import GPT2Model, KVCache, Positions
from app.models.transformer.attention import Attention
from app.models.transformer.backends.attend import attend
from app.models.transformer.block import Block, Residual
from app.models.transformer.cache.cache_step import CacheStep
from app.models.transformer.experts.dispatch import choose_dispatch
from app.models.transformer.experts.grouped import GroupedLinear
from app.models.transformer.experts.moe import Experts, MoE
from app.models.transformer.layers.context import Context, build_contexts, make_notes
from app.models.transformer.layers.cpu_products import FEW_ROWS, few_row_product
from app.models.transformer.layers.linear import Linear, linear
from app.models.transformer.mlp import MLP

Rows = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor, Context], Tensor]


# 这些类的前向，下面照着写了一遍；换成了别的类的模型照走它自己的前向。
_KNOWN = (("", (Block,)), (".attn", (Attention,)), (".mlp", (MLP, MoE)))
# {模型: {走的路: 与前向相符}}：头一步另走一遍前向，比过才用；改了 attention.py 而没有改这里，
# 或这台机器上编坏了，也不会悄悄算错。
_agrees: WeakKeyDictionary[GPT2Model, dict[str, bool]] = WeakKeyDictionary()


def why_not_lean(model: GPT2Model) -> str | None:
    """不能走捷径的理由；None = 可以。"""
    if model.training:
        return "the model is in training mode"
    if model.device.type != "cpu":
        return f"on {model.device.type} the time is not in Python"
    if torch.is_autocast_enabled("cpu"):
        return "autocast changes types layer by layer"
    reason = own_forward(model)
    if reason is not None:
        return reason
    for layer, block in model.h.items():
        for part, kinds in _KNOWN:
            found = block.get_submodule(part.removeprefix("."))
            if type(found) not in kinds:
                return f"h.{layer}{part} is a {type(found).__name__}"
    return None


def own_forward(model: GPT2Model) -> str | None:
    """有模块的调用不只是它的类的前向：挂了钩子、编译过、换过前向；None = 没有。"""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl:
            return f"{name or 'the model'} has hooks or is compiled"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward of its own"
    return None


class LeanStep:
    """model 的一步；权重就是模型的，改了模型的权重（就地）这里也看得见。"""

    def __init__(self, model: GPT2Model) -> None:
        self._model = model
        self._layers = [_block(cast(Block, block)) for block in model.h.values()]
        self._final = None if model.ln_f is None else _norm(model.ln_f)
        self._notes = make_notes(model.config, loads=False)
        self._native = NativeStep(model) if why_not_native(model) is None else None

    @torch.inference_mode()
    def __call__(self, chosen: Tensor, cache: KVCache) -> Tensor:
        """chosen (B,) 各行的下一个词元，步调一致的缓存 -> logits (B, V)。"""
        native = self._native
        if native is not None and not native.takes(len(chosen), cache):
            native = None
        way = "lean" if native is None else "native"
        known = _agrees.setdefault(self._model, {})
        if way not in known:
            known[way], logits = self._first(chosen, cache, native)
            return logits
        return self._step(chosen, cache, native) if known[way] else self._plain(chosen, cache)

    def _first(
        self, chosen: Tensor, cache: KVCache, native: NativeStep | None
    ) -> tuple[bool, Tensor]:
        start = cache.uniform
        assert start is not None
        fast = self._step(chosen, cache, native)
        cache.truncate(start)
        wanted = self._plain(chosen, cache)
        largest = float(wanted.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        limit = 0.0 if native is None else native.tolerance * largest
        agrees = torch.allclose(fast, wanted, rtol=0.0, atol=limit, equal_nan=True)
        if not agrees:
            warnings.warn(
                f"the {'lean' if native is None else 'native'} decoding step differs from the "
                f"model's forward by {float((fast - wanted).abs().max()):.1e}: decoding takes the "
                "forward; was a part of it changed without generation/lean_step.py and "
                "native_step.py?",
                stacklevel=3,
            )
        return agrees, wanted

    def _plain(self, chosen: Tensor, cache: KVCache) -> Tensor:
        out = self._model(chosen[:, None], cache=cache, use_cache=True, logits_to_keep=1)
        return out["logits"][:, -1]

    def _step(self, chosen: Tensor, cache: KVCache, native: NativeStep | None) -> Tensor:
        model, start = self._model, cache.uniform
        assert start is not None
        where = Positions.plain(start, 1, chosen.device)
        x = model.embed(chosen[:, None], where)[:, 0]
        step = cache.begin(where)
        logits = self._layer_by_layer(x, where, step) if native is None else native(x, cache)
        cache.commit(step)
        return logits

    def _layer_by_layer(self, x: Tensor, where: Positions, step: CacheStep) -> Tensor:
        model = self._model
        contexts = build_contexts(
            model.config, model.patterns, where, step, self._notes, x.dtype, False
        )
        return model.head(self.through(x, contexts))

    def through(self, x: Tensor, contexts: Sequence[Context]) -> Tensor:
        """各层与末尾的归一化：(B, C) -> (B, C)，每行一个词元。"""
        for layer, ctx in zip(self._layers, contexts, strict=True):
            x = layer(x, ctx)
        return x if self._final is None else self._final(x)


def _block(block: Block) -> Layer:
    attend_to, feed = _attention(block.attn), _feed_forward(block)
    first, second = block.residuals
    around_attn = _residual(first, block.ln_1, block.ln_1_post)
    around_mlp = _residual(second, block.ln_2, block.ln_2_post)

    def run(x: Tensor, ctx: Context) -> Tensor:
        return around_mlp(around_attn(x, attend_to, ctx), feed, ctx)

    return run


def _residual(
    kind: Residual, norm: nn.Module, post: nn.Module | None
) -> Callable[[Tensor, Layer, Context], Tensor]:
    """x <- outer(α·x + branch(inner(x)))，见 block.py。"""
    inner = _norm(norm) if kind.inner else None
    outer = _norm(norm if post is None else post) if kind.outer else None
    alpha = kind.alpha

    def run(x: Tensor, branch: Layer, ctx: Context) -> Tensor:
        y = branch(x if inner is None else inner(x), ctx)
        y = torch.add(y, x, alpha=alpha)
        return y if outer is None else outer(y)

    return run


def _norm(norm: nn.Module) -> Rows:
    if isinstance(norm, nn.LayerNorm):
        shape, eps = list(norm.normalized_shape), norm.eps
        return lambda x: torch.layer_norm(x, shape, norm.weight, norm.bias, eps)
    return norm.forward


def _attention(attn: Attention) -> Layer:
    heads, kv_heads, width = attn.heads, attn.kv_heads, attn.head_dim
    fused, out = _product(attn.c_attn), _product(attn.c_proj)
    q_norm, k_norm = attn.q_norm, attn.k_norm

    def run(x: Tensor, ctx: Context) -> Tensor:
        # 每行只有一个词元：头与词元两维对调只是换个看法。
        y = fused(x).view(len(x), heads + 2 * kv_heads, 1, width)
        q, k, v = y.split([heads, kv_heads, kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        if ctx.rotary is not None:
            q, k = ctx.rotary.apply(q), ctx.rotary.apply(k)
        assert ctx.step is not None
        k, v = ctx.step.write(ctx.layer, k, v)
        if ctx.plan.backend == "sdpa" and ctx.plan.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
        else:
            y = attend(q, k, v, ctx.plan, dropout=0.0)
        return out(y.reshape(len(x), heads * width))

    return run


def _feed_forward(block: Block) -> Layer:
    mlp = block.mlp
    if isinstance(mlp, MoE):
        return _mixture(mlp)
    dense = _dense(mlp)
    return lambda x, ctx: dense(x)


def _mixture(moe: MoE) -> Layer:
    """一行时逐个专家直接算：不排序、不数负载；几行时照 MoE 自己的，专家被换掉（量化）时也是。"""
    experts, router = moe.experts, moe.router
    if type(experts) is not Experts:
        return lambda x, ctx: moe(x[:, None], ctx)[:, 0]
    widths = (moe.router.weight.shape[1], moe.experts.c_proj.weight.shape[1])
    up, activation, down = _expert(experts.c_fc), experts.activation, _expert(experts.c_proj)
    shared = None if moe.shared is None else _dense(moe.shared)

    def run(x: Tensor, ctx: Context) -> Tensor:
        way, _ = choose_dispatch(experts.dispatch, x.device, x.dtype, widths)
        if len(x) > 1 or way != "sorted":
            return moe(x[:, None], ctx)[:, 0]
        choice = router(x)
        rows = [down(e, activation(up(e, x))) for e in choice.expert[0].tolist()]
        back = torch.stack(rows, 1)  # (1, k, C)
        y = torch.bmm(choice.weight[:, None].to(back.dtype), back)[:, 0]
        return y if shared is None else y + shared(x)

    return run


def _expert(layer: GroupedLinear) -> Callable[[int, Tensor], Tensor]:
    """(专家, (1, I)) -> (1, O)。"""

    def run(expert: int, x: Tensor) -> Tensor:
        weight, bias = layer.of(expert)
        y = few_row_product(x, weight)
        return y if bias is None else y.add_(bias)

    return run


def _dense(mlp: MLP) -> Rows:
    up, activation, down = _product(mlp.c_fc), mlp.activation, _product(mlp.c_proj)
    return lambda x: down(activation(up(x)))


def _product(layer: nn.Module) -> Rows:
    """(B, I) -> (B, O)。"""
    if type(layer) is not Linear:
        return layer.forward
    weight, bias = layer.weight, layer.bias
    if weight.dtype not in (torch.float32, torch.float64):
        return layer.forward

    def run(x: Tensor) -> Tensor:
        if len(x) > FEW_ROWS:
            return linear(x, weight, bias)
        y = few_row_product(x, weight)
        return y if bias is None else y.add_(bias)

    return run

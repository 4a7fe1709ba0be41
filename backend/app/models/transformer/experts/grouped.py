"""分组的线性层：各专家各乘自己的那几行。行已按专家排好，所以每个专家是一次普通的矩阵乘。

R 行数（词元数·k）、E 专家数、I 输入宽、O 输出宽。ends (E,)：专家 e 的行是
ends[e-1]..ends[e]；ends 之后的行不归任何专家，结果是零。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.cpu_products import FEW_ROWS
from ..layers.linear import linear


class GroupedLinear(nn.Module):
    """E 个线性层叠成一个：weight (E, O, I)、bias (E, O)。初始化统一在 init.py。"""

    init_std: float | None = None

    def __init__(self, experts: int, width_in: int, width_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width_out, width_in))
        self.bias = nn.Parameter(torch.empty(experts, width_out)) if bias else None

    def forward(self, x: Tensor, ends: Tensor, grouped: bool, complete: bool) -> Tensor:
        """x (R, I) -> (R, O)；grouped：用 torch 的分组矩阵乘。"""
        if grouped:
            return grouped_linear(x, self.weight, self.bias, ends, complete)
        return sorted_linear(x, self.weight, self.bias, ends)

    def of(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """一个专家的 (weight (O, I), bias (O,))。"""
        return self.weight[expert], None if self.bias is None else self.bias[expert]


def sorted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """x (R, I) -> (R, O)；没有行的专家不读它的权重（反向只把它的梯度置零）。

    autocast 时按它的精度算，与 F.linear 相同。
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _sorted_linear(*_as_computed(x, weight, bias), ends)
    # 解码一个词元时只换它那几个专家的精度，不换整张权重。
    x, _, _ = _as_computed(x, x, None)
    return _product(x, weight, bias, ends)


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, complete: bool
) -> Tensor:
    """同上，torch 的分组矩阵乘。

    complete：每行都归某个专家。否则多出的行内核不写，进出都要盖成零，反向才没有垃圾。
    """
    x, weight, bias = _as_computed(x, weight, bias)
    row = torch.arange(x.shape[0], device=x.device)
    outside = None if complete else (row >= ends[-1])[:, None]
    if outside is not None:
        x = x.masked_fill(outside, 0.0)
    y: Tensor = F.grouped_mm(x, weight.mT, offs=ends.to(torch.int32))
    if bias is not None:
        y = _Bias.apply(y, bias, torch.searchsorted(ends, row, right=True))
    return y if outside is None else y.masked_fill(outside, 0.0)


class _Bias(torch.autograd.Function):
    """y (R, O) + bias[expert]；expert == E 的行不归任何专家，调用者随后盖成零。

    梯度写成一次乘法：取下标的反向把几万行挤进 E 行相加，H100 上占整层时间的大半
    （docs/decisions/026）。
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(expert)
        ctx.experts = bias.shape[0]
        return y + bias[expert.clamp(max=bias.shape[0] - 1)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (expert,), g = ctx.saved_tensors, grads[0]
        if not ctx.needs_input_grad[1]:
            return g, None, None
        mine = expert == torch.arange(ctx.experts, device=g.device)[:, None]  # (E, R)
        return g, mine.to(g.dtype) @ g, None


def _as_computed(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(专家, 它的行)，只有有行的专家。"""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    done = 0
    for expert, rows in _spans(ends):
        each = None if bias is None else bias[expert].to(x.dtype)
        _write(y[rows], x[rows], weight[expert].to(x.dtype), each)
        done = rows.stop
    y[done:] = 0.0
    return y


def _write(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y <- x·weightᵀ + bias；行多时直接写进整张结果，不另占一份。"""
    if x.shape[0] <= FEW_ROWS and weight.is_contiguous():
        y.copy_(linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """(E, O, I)：每个专家的那一片只写一遍。"""
    out = torch.empty_like(weight)
    seen = 0
    for expert, rows in _spans(ends):
        out[seen:expert] = 0.0
        torch.mm(g[rows].t(), x[rows], out=out[expert])
        seen = expert + 1
    out[seen:] = 0.0
    return out


def _bias_gradient(g: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = weight.new_zeros(weight.shape[:2])
    for expert, rows in _spans(ends):
        torch.sum(g[rows], 0, out=out[expert])
    return out


# 是一个算子而不是 autograd.Function，因为每个专家有几行要看张量的值：编译器追进去就会断图。
# 自己写反向：逐个取 weight[e] 时，autograd 会为每个专家另造一张 (E, O, I) 的零再相加。
@torch.library.custom_op("gpt2::sorted_linear", mutates_args=())
def _sorted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    return _product(x, weight, bias, ends)


@_sorted_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("gpt2::sorted_linear_backward", mutates_args=())
def _sorted_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias 的梯度)；不要的是空的。"""
    g = g.contiguous()
    return (
        _product(g, weight.mT, None, ends) if for_x else g.new_empty(0),
        _weight_gradient(g, x, weight, ends) if for_weight else g.new_empty(0),
        _bias_gradient(g, weight, ends) if for_bias else g.new_empty(0),
    )


@_sorted_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        g.new_empty(x.shape if for_x else 0),
        g.new_empty(weight.shape if for_weight else 0),
        g.new_empty(weight.shape[:2] if for_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ends = inputs
    ctx.save_for_backward(x, weight, ends)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    grads = _sorted_backward(g, *ctx.saved_tensors, *wanted)
    return (*(one if want else None for one, want in zip(grads, wanted, strict=True)), None)


_sorted_linear.register_autograd(_gradients, setup_context=_save)

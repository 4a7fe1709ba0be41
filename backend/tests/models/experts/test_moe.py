"""混合专家：各路由器对十行的双精度参考，各种分派互为对照，均衡的手算值，与其它开关的组合。

N 词元数、E 专家数、k 每个词元的专家数。
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.models.transformer import MoEConfig
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.experts.balance import balance_loss, capacity, z_loss
from app.models.transformer.experts.dispatch import (
    choose_dispatch,
    count,
    drop_overflow,
    explain_dispatch,
)
from app.models.transformer.experts.grouped import grouped_linear, sorted_linear
from app.models.transformer.experts.moe import MoE
from app.models.transformer.experts.router import choose
from app.models.transformer.layers.context import Context, Note
from app.models.transformer.mlp import ACTIVATIONS, MLP
from app.models.transformer.visibility.positions import Positions

from ..helpers import MIXED, ROUTERS, relative, tiny_config
from ..twin import garbage_is_nan

__all__ = ["garbage_is_nan"]
CPU = torch.device("cpu")
PROBABILITIES = torch.tensor(
    [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.4, 0.35, 0.25]], dtype=torch.float64
)


def moe_layer(scale: float = 1.0, **changes: Any) -> MoE:
    """双精度的一层；路由器的权重大到选择分明。"""
    layer = MoE(tiny_config(**{"moe_num_experts": 4, "dropout": 0.0, **changes})).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3 * scale)
        if layer.router.selection_bias is not None:
            layer.router.selection_bias.normal_(std=0.3)
    return layer


def context(mask: Tensor | None = None, length: int = 24, **options: Any) -> Context:
    where = Positions.plain(0, length, CPU) if mask is None else Positions.padded(mask)
    note = Note(frozenset({"load"}))
    return Context(where, MaskPlan.build(where, where), note=note, **options)


def by_hand(layer: MoE, x: Tensor) -> Tensor:
    """一个词元一个词元地算，(N, C)。"""
    kind, k, experts = layer.router.kind, layer.router.top_k, layer.experts
    rows = []
    for token in x:
        logits = layer.router.weight @ token
        score = logits.sigmoid() if kind == "sigmoid" else logits.exp() / logits.exp().sum()
        bias = layer.router.selection_bias
        ranked = score if bias is None else score + bias
        best = sorted(range(len(score)), key=lambda e: -ranked[e].item())[:k]
        total = sum(score[e] for e in best) if kind in ("softmax_topk", "sigmoid") else 1.0
        row = torch.zeros_like(token)
        for e in best:
            hidden = experts.c_fc.weight[e] @ token
            hidden = hidden if experts.c_fc.bias is None else hidden + experts.c_fc.bias[e]
            y = experts.c_proj.weight[e] @ experts.activation(hidden)
            y = y if experts.c_proj.bias is None else y + experts.c_proj.bias[e]
            row = row + score[e] / total * y
        rows.append(row)
    return torch.stack(rows)


# ---- 路由器与均衡 ----


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dispatch", ["sorted", "reference"])
def test_each_router_against_one_token_at_a_time(name: str, dispatch: str) -> None:
    changes = dict(ROUTERS[name])
    moe = changes.pop("moe", MoEConfig())
    layer = moe_layer(moe=MoEConfig(**(vars(moe) | {"dispatch": dispatch})), **changes)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    assert relative(layer(x, context()).flatten(0, 1), by_hand(layer, x.flatten(0, 1))) < 1e-12


def test_weights_of_each_router() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    p, s = logits.softmax(-1)[0], logits.sigmoid()[0]
    plain = choose("softmax", logits, 2)
    assert plain.expert.tolist() == [[0, 1]] and torch.equal(plain.weight[0], p[:2])
    renormalised = choose("softmax_topk", logits, 2).weight[0]
    # 归一之后就是两个打分自己的 softmax。
    assert torch.allclose(renormalised, logits[0, :2].softmax(-1), atol=1e-15, rtol=0)
    bias = torch.tensor([-1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    chosen = choose("sigmoid", logits, 2, bias)
    assert chosen.expert.tolist() == [[3, 1]], "the bias takes part in the choice"
    wanted = s[[3, 1]] / s[[3, 1]].sum()
    assert torch.allclose(chosen.weight[0], wanted, atol=1e-15, rtol=0), "and not in the weight"


def test_balance_loss_by_hand() -> None:
    """三个专家、四个词元：Switch 的 1.134375，首两选的 2.146875。"""
    for k, wanted in ((1, 1.134375), (2, 2.146875)):
        load = count(PROBABILITIES.topk(k, -1).indices, 3)
        assert balance_loss(load, PROBABILITIES, None).item() == pytest.approx(wanted, abs=1e-12)
    uniform = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    assert balance_loss(torch.tensor([4, 4, 4]), uniform, None).item() == pytest.approx(2.0)


def test_balance_loss_is_that_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 5, dtype=torch.float64)
    mask = (torch.rand(4, 10) < 0.7).long()
    for k in (1, 2, 3):
        wanted = modeling.load_balancing_loss_func((logits,), 5, k, mask)
        share, real = logits.softmax(-1), mask.flatten() == 1
        expert = share.topk(k, -1).indices.masked_fill(~real[:, None], 5)
        got = balance_loss(count(expert, 5), share, real)
        assert got.item() == pytest.approx(float(wanted), abs=1e-6)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    assert z_loss(logits + 2, None).item() == pytest.approx(4.0, abs=1e-12)
    assert z_loss(logits, None).item() == pytest.approx(0.0, abs=1e-12)


def test_capacity_by_hand() -> None:
    """16 个词元、8 个专家，(1,1,10,1,1,1,1,0)：容量 2 丢一半，容量 3 丢 43.75%。"""
    load = (1, 1, 10, 1, 1, 1, 1, 0)
    expert = torch.tensor([e for e, n in enumerate(load) for _ in range(n)])[:, None]
    for factor, limit, dropped, padded in ((1.0, 2, 0.5, 0.5), (1.25, 3, 0.4375, 15 / 24)):
        assert capacity(factor, None, 16, 1, 8) == limit
        assert capacity(factor, torch.ones(16).bool(), 99, 1, 8) == limit
        kept = count(drop_overflow(expert, 8, limit), 8)
        assert 1 - kept.sum().item() / 16 == dropped
        assert (limit - kept).sum().item() / (8 * limit) == padded
        assert kept.tolist() == [min(n, limit) for n in load]


def test_overflow_keeps_first_choices_and_earlier_tokens() -> None:
    expert = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1]])
    assert drop_overflow(expert, 2, 2).tolist() == [[1, 2], [0, 1], [0, 2], [2, 2]]


def test_router_computes_in_float32_under_autocast() -> None:
    layer = MoE(tiny_config(**MIXED))
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.router(x)
    assert got.logits.dtype == torch.float32 and torch.equal(got.logits, layer.router(x).logits)


def test_jitter_only_in_training() -> None:
    layer = moe_layer(moe=MoEConfig(jitter_noise=0.1))
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    assert torch.equal(layer(x, context()), layer(x, context()))
    layer.train()
    assert not torch.equal(layer(x, context()), layer(x, context()))


# ---- 分派 ----


def everything(layer: MoE, x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """输出、输入的梯度与每个参数的梯度。"""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, context(mask))
    y.mul(torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_sorted_is_the_reference(activation: str, bias: bool) -> None:
    """前向与反向，有填充，有容量，有空闲的专家。"""
    moe = {"capacity_factor": 0.75, "router": "softmax"}
    layers = [
        moe_layer(activation=activation, bias=bias, moe=MoEConfig(dispatch=way, **moe)).train()
        for way in ("reference", "sorted")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    with torch.no_grad():
        for layer in layers:
            layer.router.weight[2] = -9.0 * layer.router.weight[1]
    mask = (torch.rand(3, 24) < 0.8).long()
    x = torch.randn(3, 24, 32, dtype=torch.float64)
    for wanted, got in zip(*(everything(one, x, mask) for one in layers), strict=True):
        assert relative(got, wanted) < 1e-12


@settings(max_examples=40)
@given(
    st.integers(2, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 30),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_sorted_is_the_reference_for_every_shape(
    experts: int, k: int, rows: int, length: int, padded: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    shape = {
        "moe_num_experts": experts, "moe_top_k": min(k, experts), "n_embed": 4, "n_head": 1,
        "context_size": 64,
    }  # fmt: skip
    one, two = (
        moe_layer(moe=MoEConfig(router="softmax", hidden=8, dispatch=way), **shape)
        for way in ("sorted", "reference")
    )
    two.load_state_dict(one.state_dict())
    x = torch.randn(rows, length, 4, dtype=torch.float64)
    mask = (torch.rand(rows, length) < 0.5).long() if padded else torch.ones(rows, length)
    for got, wanted in zip(*(everything(layer, x, mask) for layer in (one, two)), strict=True):
        assert (got - wanted).abs().max() <= 1e-12 * (1 + wanted.abs().max())


def test_grouped_matrix_product_is_the_sorted_one() -> None:
    """F.grouped_mm 没有双精度，故在 float32 上比；不归任何专家的行是零，也没有梯度。"""
    weight, bias = torch.randn(4, 16, 8), torch.randn(4, 16)
    ends, results = torch.tensor([3, 3, 10, 12]), []
    x = torch.randn(15, 8)
    x[12:] = float("nan")
    for run in (
        lambda *a: sorted_linear(*a, ends),
        lambda *a: grouped_linear(*a, ends, complete=False),
    ):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = run(*inputs)
        y.square().sum().backward()
        assert not y[12:].any() and not inputs[0].grad[12:].any()  # type: ignore[index]
        results.append([y.detach(), inputs[0].grad[:12], *(t.grad for t in inputs[1:])])  # type: ignore[index]
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-6


def test_gradients_of_the_sorted_product_numerically() -> None:
    x, w = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 3), (4, 5, 3)))
    b = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 3, 6])
    assert torch.autograd.gradcheck(lambda *a: sorted_linear(*a, ends), (x, w, b))
    assert torch.autograd.gradcheck(lambda *a: sorted_linear(*a, None, ends), (x, w))


@pytest.mark.usefixtures("garbage_is_nan")
def test_experts_without_tokens_have_a_gradient_of_zero() -> None:
    """首、中、尾的空专家；没写过的内存是 NaN，漏写一处就看得见。"""
    x, ends = torch.randn(7, 3, requires_grad=True), torch.tensor([0, 2, 2, 5, 5])
    w, b = torch.randn(5, 4, 3, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = sorted_linear(x, w, b, ends)
    y.sum().backward()
    assert not y[5:].any() and not x.grad[5:].any()  # type: ignore[index]
    for grad in (w.grad, b.grad):
        assert grad is not None and [bool(one.any()) for one in grad] == [0, 1, 0, 1, 0]


def test_gradients_of_a_layer_numerically() -> None:
    layer = moe_layer(n_embed=4, n_head=1, moe=MoEConfig(hidden=6, shared_experts=1))
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        ctx = context(length=3)
        named = dict(zip(names, values, strict=True))
        y = torch.func.functional_call(layer, named, (x, ctx))
        load = ctx.note.load
        assert load is not None
        return torch.cat([y.flatten(), load.balance[None], load.z[None]])

    inputs = [torch.randn(1, 3, 4, dtype=torch.float64), *(p.detach() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


def test_one_token_reads_the_weights_of_its_experts_only() -> None:
    """别的专家的权重是 NaN 也不碍事；没有词元的专家梯度恰为零。"""
    layer = moe_layer(moe=MoEConfig(dispatch="sorted"))
    x, ctx = torch.randn(1, 1, 32, dtype=torch.float64), context(length=1)
    chosen = layer.router(x[0]).expert[0].tolist()
    wanted = layer(x, ctx)
    with torch.no_grad():
        for e in set(range(4)) - set(chosen):
            layer.experts.c_fc.weight[e] = layer.experts.c_proj.weight[e] = math.nan
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert relative(layer(x, ctx), wanted) < 1e-12
    layer(x, ctx).sum().backward()
    for e in range(4):
        assert bool(layer.experts.c_fc.weight.grad[e].any()) == (e in chosen)


def test_the_choice_of_dispatch_says_why() -> None:
    half, single = torch.bfloat16, torch.float32
    assert choose_dispatch("auto", CPU, single, (32,))[0] == "sorted"
    gpu = torch.device("cuda")
    assert choose_dispatch("auto", gpu, half, (32, 64))[0] == "grouped"
    way, why = choose_dispatch("auto", gpu, half, (12, 64))
    assert way == "sorted" and "rows of 12 numbers" in why
    assert choose_dispatch("auto", gpu, single, (32,))[0] == "sorted"
    with pytest.raises(ValueError, match="dispatch='grouped': .*torch.float64"):
        choose_dispatch("grouped", CPU, torch.float64, (32,))
    assert explain_dispatch(tiny_config(), device=CPU) is None
    assert explain_dispatch(tiny_config(**MIXED), device=CPU) == choose_dispatch(
        "auto", CPU, single, (32, 64)
    )


# ---- 与稠密层的关系 ----


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid"])
def test_identical_experts_are_the_dense_mlp(activation: str, router: str) -> None:
    hidden = 40
    config = tiny_config(
        moe_num_experts=5, moe_top_k=3, activation=activation, dropout=0.0,
        moe=MoEConfig(router=router, hidden=hidden),
    )  # fmt: skip
    dense, layer = MLP(config, hidden).double(), MoE(config).double()
    torch.nn.init.normal_(layer.router.weight)
    with torch.no_grad():
        for name in ("c_fc", "c_proj"):
            one, many = getattr(dense, name), getattr(layer.experts, name)
            many.weight.copy_(one.weight.normal_().expand_as(many.weight))
            many.bias.copy_(one.bias.normal_().expand_as(many.bias))
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    assert relative(layer(x, context()), dense(x)) < 1e-12


def test_the_order_of_the_experts_does_not_matter() -> None:
    layer, other = moe_layer(), moe_layer()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for (_, a), (_, b) in zip(layer.named_parameters(), other.named_parameters(), strict=True):
            b.copy_(a[order])
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    one, two = context(), context()
    assert relative(layer(x, one), other(x, two)) < 1e-12
    assert one.note.load is not None and two.note.load is not None
    assert torch.equal(one.note.load.load[order], two.note.load.load)


def test_the_shared_expert_is_added() -> None:
    layer = moe_layer(moe=MoEConfig(shared_experts=2, shared_hidden=24))
    assert layer.shared is not None and layer.shared.c_fc.weight.shape == (48, 32)
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    both, shared, layer.shared = layer(x, context()), layer.shared(x), None
    assert relative(both, layer(x, context()) + shared) < 1e-12


# ---- 整个模型 ----

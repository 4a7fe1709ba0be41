"""RoPE：公布的常数、平移不变、两种布局相等、长位置的精度、反向、挪动已存的键。"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from app.models.transformer.config import RoPEConfig
from app.models.transformer.layers import rope as module
from app.models.transformer.layers.rope import (
    Rotary,
    inverse_frequencies,
    rerotate,
)
from app.models.transformer.weights.rope_rows import to_half, to_interleaved

D, CONTEXT = 64, 1024
LAYOUTS = ("half", "interleaved")
SCALINGS = (
    {},
    {"theta": 500_000.0},
    {"scaling": "linear", "factor": 4.0},
    {"scaling": "ntk", "factor": 4.0},
    {"scaling": "yarn", "factor": 4.0},
    {"scaling": "yarn", "factor": 16.0, "original_context": 512},
)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)


def rotary(positions: Tensor, dtype: torch.dtype = torch.float64, **options: object) -> Rotary:
    return Rotary.at(positions, RoPEConfig(**options), D, CONTEXT, dtype)


def at(position: int, **options: object) -> Rotary:
    return rotary(torch.tensor([[position]]), **options)


def plainly(x: Tensor, angle: Tensor, layout: str) -> Tensor:
    """定义本身：逐对乘 2×2 的旋转矩阵。angle (T, D/2)。"""
    out = torch.empty_like(x)
    for i in range(x.shape[-1] // 2):
        a, b = (i, i + x.shape[-1] // 2) if layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = angle[:, i].cos(), angle[:, i].sin()
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


# 常数


def test_plain_frequencies() -> None:
    inverse, scale = inverse_frequencies(RoPEConfig(), D, CONTEXT)
    assert inverse.dtype == torch.float64 and inverse.shape == (D // 2,) and scale == 1.0
    assert inverse[0] == 1.0
    assert inverse[1].item() == pytest.approx(0.7498942093, abs=5e-11)
    assert inverse[31].item() == pytest.approx(1.333521432e-4, rel=5e-10)


def test_linear_divides_every_frequency() -> None:
    scaled, scale = inverse_frequencies(RoPEConfig(scaling="linear", factor=4.0), D, CONTEXT)
    plain, _ = inverse_frequencies(RoPEConfig(), D, CONTEXT)
    assert torch.equal(scaled, plain / 4) and scale == 1.0


def test_ntk_raises_theta_so_that_the_slowest_pair_slows_by_the_factor() -> None:
    scaled, scale = inverse_frequencies(RoPEConfig(scaling="ntk", factor=4.0), D, CONTEXT)
    plain, _ = inverse_frequencies(RoPEConfig(), D, CONTEXT)
    assert scaled[1].item() ** (-D / 2) == pytest.approx(41829.3659, abs=5e-5)
    assert scaled[0] == 1.0 and scale == 1.0
    assert (plain[-1] / scaled[-1]).item() == pytest.approx(4.0, rel=1e-13)


def test_yarn_range() -> None:
    assert module._yarn_range(10_000.0, D, CONTEXT) == (5, 18)


@pytest.mark.parametrize(("factor", "scale"), [(4.0, 1.138629), (16.0, 1.277259), (32.0, 1.346574)])
def test_yarn_attention_factor(factor: float, scale: float) -> None:
    config = RoPEConfig(scaling="yarn", factor=factor)
    assert inverse_frequencies(config, D, CONTEXT)[1] == pytest.approx(scale, abs=5e-7)
    turned = at(7, scaling="yarn", factor=factor)
    assert torch.allclose(turned.cos**2 + turned.sin**2, torch.tensor(scale**2).double(), atol=2e-6)


@pytest.mark.parametrize("given_as", ["context_size", "original_context"])
def test_yarn_frequencies(given_as: str) -> None:
    original = CONTEXT if given_as == "original_context" else None
    context = 4 * CONTEXT if given_as == "original_context" else CONTEXT
    config = RoPEConfig(scaling="yarn", factor=4.0, original_context=original)
    got = inverse_frequencies(config, D, context)[0][[0, 8, 16, 24, 31]].tolist()
    want = [1.0, 0.0826923077, 0.00365384615, 0.00025, 3.33380358e-5]
    assert got == pytest.approx(want, rel=2e-9)


@pytest.mark.parametrize("context", [1, 2, 6, 7])
def test_yarn_where_no_pair_turns_fully(context: int) -> None:
    """原上下文约不足一圈：斜坡的两端相遇或颠倒；不除以零，全部内插（第 0 对除外）。"""
    config = RoPEConfig(scaling="yarn", factor=8.0, original_context=context)
    plain, _ = inverse_frequencies(RoPEConfig(), D, CONTEXT)
    scaled, _ = inverse_frequencies(config, D, CONTEXT)
    assert torch.allclose(scaled[1:], plain[1:] / 8, rtol=1e-14)


def test_yarn_where_every_pair_turns_often() -> None:
    config = RoPEConfig(theta=10.0, scaling="yarn", factor=8.0, original_context=100_000)
    plain, _ = inverse_frequencies(RoPEConfig(theta=10.0), D, CONTEXT)
    assert torch.equal(inverse_frequencies(config, D, CONTEXT)[0], plain)


def test_head_width_errors() -> None:
    for width in (0, 63):
        with pytest.raises(ValueError, match=f"head_dim={width} must be even"):
            inverse_frequencies(RoPEConfig(), width, CONTEXT)
    with pytest.raises(ValueError, match="'ntk' with head_dim=2"):
        inverse_frequencies(RoPEConfig(scaling="ntk", factor=2.0), 2, CONTEXT)


# 旋转


@every_layout
@every_scaling
def test_equals_the_definition(layout: str, scaling: dict[str, object]) -> None:
    positions = torch.tensor([[0, 3, 4, 900, 5000]])
    config = RoPEConfig(layout=layout, **scaling)
    inverse, scale = inverse_frequencies(config, D, CONTEXT)
    x = torch.randn(2, 3, 5, D, dtype=torch.float64)
    want = plainly(x, positions[0, :, None] * inverse, layout) * scale
    got = rotary(positions, layout=layout, **scaling).apply(x)
    assert (got - want).abs().max() <= 1e-12
    # 一个词元走另一条路，须得同样的值。
    for i, position in enumerate(positions[0].tolist()):
        one = at(position, layout=layout, **scaling).apply(x[:, :, i : i + 1])
        assert (one - want[:, :, i : i + 1]).abs().max() <= 1e-12


@every_layout
def test_position_zero_is_the_identity(layout: str) -> None:
    x = torch.randn(2, 3, 4, D)
    still = rotary(torch.zeros(1, 4, dtype=torch.long), torch.float32, layout=layout)
    assert torch.equal(still.apply(x), x)


@given(
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.sampled_from(LAYOUTS),
    st.sampled_from(SCALINGS),
)
def test_scores_depend_on_the_distance_alone(
    m: int, n: int, shift: int, layout: str, scaling: dict[str, object]
) -> None:
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64) / D**0.5

    def score(i: int, j: int) -> float:
        turn = {"layout": layout, **scaling}
        return (at(i, **turn).apply(q) * at(j, **turn).apply(k)).sum().item()

    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=1e-12)


@every_layout
def test_rows_have_their_own_positions(layout: str) -> None:
    x = torch.randn(2, 3, 4, D, dtype=torch.float64)
    positions = torch.tensor([[-1, -1, 0, 1], [7, 8, 9, 10]])
    both = rotary(positions, layout=layout).apply(x)
    for row in (0, 1):
        alone = rotary(positions[row : row + 1], layout=layout).apply(x[row : row + 1])
        assert torch.equal(both[row : row + 1], alone)
    assert torch.isfinite(both).all()


@every_scaling
def test_both_layouts_give_the_same_scores_once_the_weights_are_permuted(
    scaling: dict[str, object],
) -> None:
    heads, groups, width = 4, 2, 24
    x = torch.randn(2, 9, width, dtype=torch.float64)
    weights = {
        n: (torch.randn(n * D, width).double(), torch.randn(n * D).double())
        for n in (heads, groups)
    }
    positions = torch.arange(100, 109)[None]

    def scores(layout: str) -> Tensor:
        turned = []
        for n, pair in weights.items():
            weight, bias = pair if layout == "half" else (to_interleaved(w, n) for w in pair)
            y = (x @ weight.T + bias).view(2, 9, n, D).transpose(1, 2)
            turned.append(rotary(positions, layout=layout, **scaling).apply(y))
        q, k = turned
        return q @ k.repeat_interleave(heads // groups, 1).transpose(-1, -2)

    a, b = scores("half"), scores("interleaved")
    assert (a - b).abs().max() / a.abs().max() <= 1e-14


@pytest.mark.parametrize("shape", [(4 * D, 24), (4 * D,)])
def test_permutation_round_trip_is_bitwise(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    moved = to_interleaved(weight, 4)
    assert not torch.equal(moved, weight) and moved.shape == weight.shape
    assert torch.equal(to_half(moved, 4), weight)
    assert torch.equal(to_interleaved(to_half(weight, 4), 4), weight)
    # 第二个头的第 1 对：half 是 (1, 33) 行，interleaved 是 (2, 3) 行。
    assert torch.equal(moved[D + 2 : D + 4], weight[[D + 1, D + 33]])


@pytest.mark.parametrize("heads", [0, 7, 12])
def test_permutation_needs_whole_even_heads(heads: int) -> None:
    with pytest.raises(ValueError, match=f"60 rows, which are not heads={heads}"):
        to_half(torch.zeros(60, 3), heads)


# 精度


@every_layout
def test_float32_at_position_one_hundred_thousand(layout: str) -> None:
    positions = torch.tensor([[100_000, 99_999]])
    inverse, _ = inverse_frequencies(RoPEConfig(), D, CONTEXT)
    exact = [[math.cos(p * f) for f in inverse.tolist()] for p in (100_000, 99_999)]
    turned = rotary(positions, torch.float32, layout=layout)
    assert turned.cos.dtype == torch.float32
    assert (turned.cos[0, 0].double() - torch.tensor(exact).double()).abs().max() <= 1e-6
    # 角若用 float32 算，就达不到。
    coarse = (positions[0, :, None].float() * inverse.float()).cos()
    assert (coarse.double() - torch.tensor(exact).double()).abs().max() > 1e-3


@every_layout
def test_half_precision_is_rounded_once(layout: str) -> None:
    x = torch.randn(2, 3, 50, D).bfloat16()
    turned = rotary(torch.arange(1000, 1050)[None], torch.bfloat16, layout=layout)
    assert turned.cos.dtype == torch.float32
    once = turned.apply(x.float()).bfloat16()
    assert turned.apply(x).dtype == torch.bfloat16
    assert torch.equal(turned.apply(x), once)
    single = rotary(torch.tensor([[1000]]), torch.bfloat16, layout=layout)
    assert torch.equal(single.apply(x[:, :, :1]), once[:, :, :1])


@every_layout
@pytest.mark.parametrize("length", [1, 3])
def test_the_dtype_of_x_is_kept(layout: str, length: int) -> None:
    for table in (torch.float32, torch.float64):
        turned = rotary(torch.arange(5, 5 + length)[None], table, layout=layout)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(1, 2, length, D, dtype=dtype, requires_grad=True)
            y = turned.apply(x)
            y.sum().backward()
            assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
            assert turned.apply(x.detach()).dtype == dtype


# 反向


@every_layout
def test_gradients(layout: str) -> None:
    turned = rotary(torch.tensor([[2, 9, 40]]), layout=layout, scaling="yarn", factor=4.0)
    x = torch.randn(2, 2, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(turned.apply, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(turned.apply, x, fast_mode=True)


@every_layout
def test_gradient_through_any_strides(layout: str) -> None:
    """sum 的梯度步长为 0，转置的输入末维不连续：都不许出错，也不许改变结果。"""
    turned = rotary(torch.arange(5)[None], layout=layout)
    x = torch.randn(2, 3, D, 5, dtype=torch.float64).transpose(2, 3).requires_grad_()
    turned.apply(x).sum().backward()
    ones = torch.ones(2, 3, 5, D, dtype=torch.float64)
    back = rotary(-torch.arange(5)[None], layout=layout).apply(ones)
    assert x.grad is not None and (x.grad - back).abs().max() <= 1e-14
    assert (turned.apply(x) - turned.apply(x.contiguous())).abs().max() <= 1e-14
    odd = torch.randn(1 + 3 * 5 * D)[1:].view(1, 3, 5, D).double()
    odd = torch.cat((torch.zeros(1).double(), odd.flatten()))[1:].view(1, 3, 5, D)
    assert (turned.apply(odd) - turned.apply(odd.clone())).abs().max() <= 1e-14


@every_layout
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms(layout: str) -> None:
    turned = rotary(torch.arange(4)[None], layout=layout)
    x = torch.randn(3, 1, 2, 4, D, dtype=torch.float64)

    def loss(one: Tensor) -> Tensor:
        return turned.apply(one).pow(3).sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    whole = torch.func.grad(lambda all_of: sum(loss(one) for one in all_of))(x)
    assert (each - whole).abs().max() <= 1e-12


@every_layout
def test_the_input_is_left_alone(layout: str) -> None:
    turned = rotary(torch.arange(4)[None], torch.float32, layout=layout)
    for x in (torch.randn(1, 2, 4, D), torch.randn(1, 2, 4, D, requires_grad=True)):
        before = x.detach().clone()
        turned.apply(x)
        assert torch.equal(x, before)


@every_layout
def test_compiles_whole_and_once_for_every_position(layout: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    config = RoPEConfig(layout=layout, scaling="yarn", factor=4.0)

    def forward(x: Tensor, positions: Tensor) -> Tensor:
        return Rotary.at(positions, config, D, CONTEXT).apply(x)

    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    for start in (0, 5, 900):
        positions = torch.arange(start, start + 6)[None]
        x = torch.randn(2, 3, 6, D, requires_grad=True)
        ours, plain = compiled(x, positions), forward(x, positions)
        assert (ours - plain).abs().max() <= 1e-6
        a, b = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (ours, plain))
        assert (a - b).abs().max() <= 1e-5
    assert counter.frame_count == 1


# 挪动已存的键


@every_layout
@every_scaling
def test_rerotate_equals_rotating_elsewhere(layout: str, scaling: dict[str, object]) -> None:
    config = RoPEConfig(layout=layout, **scaling)
    positions = torch.tensor([[5, 6, 7], [300, 310, 320]])
    k = torch.randn(2, 2, 3, D, dtype=torch.float64)
    stored = rotary(positions, layout=layout, **scaling).apply(k)
    for delta in (torch.tensor([3, 120]), torch.tensor([4]), torch.tensor([-9])):
        moved = rerotate(stored, delta, config, CONTEXT)
        want = rotary(positions - delta[:, None], layout=layout, **scaling).apply(k)
        assert (moved - want).abs().max() <= 1e-12
    still = rerotate(stored.float(), torch.tensor([0]), config, CONTEXT)
    assert torch.equal(still, stored.float())

"""码、取整到最近与 GPTQ 的数值。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.quantization.codes import Codes, Scheme, pack, unpack
from app.quantization.gptq import DAMPING, Moments, gptq
from app.quantization.rtn import Grid, round_to_nearest

from .helpers import SCHEMES


def eight_bits(x: Tensor) -> bool:
    return torch.equal(x.bfloat16().float(), x.float())


@pytest.mark.parametrize("name", SCHEMES)
def test_every_weight_is_within_half_a_step(name: str) -> None:
    weight = torch.randn(3, 24, 64) * torch.rand(3, 24, 1).exp()
    codes = round_to_nearest(weight, SCHEMES[name])
    assert codes.shape == (3, 24, 64) and codes.scheme == SCHEMES[name]
    codes.check("w")
    error = (codes.dequantize() - weight).abs()
    if codes.scale is None:
        assert (error <= weight.abs() * 2**-11).all()
        return
    assert codes.scale.dtype == torch.float16 and eight_bits(codes.scale)
    step = codes.scale.float().repeat_interleave(64 // codes.scale.shape[-1], -1)
    # 尺度舍入到 8 位：最大的权重可能落在格子外一点。
    assert (error <= 0.5 * step + weight.abs() * 2**-8).all()
    if codes.minimum is not None:
        assert eight_bits(codes.minimum)


def test_nibbles_low_is_the_even_column() -> None:
    assert pack(torch.tensor([[1, 2, 3, 15]])).tolist() == [[0x21, 0xF3]]
    random = torch.randint(0, 16, (5, 64))
    assert torch.equal(unpack(pack(random)).long(), random)


def test_rows_are_the_rows_of_the_matrix() -> None:
    ids = torch.tensor([[3, 0], [3, 7]])
    for scheme in SCHEMES.values():
        codes = round_to_nearest(torch.randn(8, 64), scheme)
        assert torch.equal(codes.rows(ids), codes.dequantize()[ids])
        assert torch.equal(codes.outputs(slice(2, 5)).dequantize(), codes.dequantize()[2:5])


@pytest.mark.parametrize("name", SCHEMES)
def test_zero_tiny_and_constant_rows(name: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3] = 1e-9, 5.0, -5.0
    codes = round_to_nearest(weight, SCHEMES[name])
    codes.check("w")
    back = codes.dequantize()
    assert back[0].abs().max() == 0 and back[1].abs().max() < 1e-6
    assert torch.allclose(back[2:], weight[2:], rtol=5e-3)


def test_values_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"big holds values up to 1e\+05"):
        round_to_nearest(torch.full((2, 64), 1e5), Scheme(16), "big")
    with pytest.raises(ValueError, match="cannot be stored"):
        round_to_nearest(torch.full((2, 64), 1e9), Scheme(8), "big")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ((3,), "bits=3 must be 16, 8 or 4"),
        ((8, 32), "group=32, asymmetric=False are for bits=4"),
        ((16, 0, True), "asymmetric=True are for bits=4"),
        ((4,), "group=0 must be even and at least 2"),
        ((4, 33), "group=33 must be even"),
    ],
)
def test_schemes_that_cannot_be(scheme: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(*scheme)


def test_a_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match="group=128 does not divide the width 192.*16 or 32 or 64"):
        round_to_nearest(torch.randn(4, 192), Scheme(4, 128))
    with pytest.raises(ValueError, match="width 37 .*use 8 bits"):
        round_to_nearest(torch.randn(4, 37), Scheme(4, 32))


@pytest.mark.parametrize("part", ["codes", "scale", "minimum"])
def test_check_names_the_bad_part(part: str) -> None:
    good = round_to_nearest(torch.randn(4, 64), Scheme(4, 32, True)).tensors()
    half = torch.full((4, 64), float("nan"), dtype=torch.float16)
    bad = Codes(16, half) if part == "codes" else None
    if bad is None:
        good[part][0, 0] = float("nan")
        bad = Codes(4, good["codes"], good["scale"], good["minimum"], 32)
    with pytest.raises(ValueError, match=f"w.{part} holds NaN"):
        bad.check("w")


def reference(weight: Tensor, moments: Tensor, scheme: Scheme) -> Tensor:
    """论文的式 (2)、(3)，逐列求逆：还原后的权重 (O, I)。"""
    left, result, h = weight.double().clone(), [], moments.clone()
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    size, grid = scheme.group or weight.shape[1], None
    for i in range(weight.shape[1]):
        if i % size == 0:
            grid = Grid.of(left[:, None, :size], scheme, "w")
        q = grid.values(grid.codes(left[:, None, :1])).flatten()
        inverse = torch.linalg.inv(h)
        left = left[:, 1:] - torch.outer((left[:, 0] - q) / inverse[0, 0], inverse[0, 1:])
        result, h = [*result, q], h[1:, 1:]
    return torch.stack(result, 1)


def correlated(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width) @ (torch.randn(width, width) / width**0.5 + torch.eye(width))


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32), Scheme(4, 16), Scheme(4, 32, True)])
def test_gptq_equals_its_reference(scheme: Scheme) -> None:
    weight, x = torch.randn(24, 64), correlated(200, 64)
    moments = Moments(64, torch.device("cpu"))
    moments.add(x[:80].view(2, 40, 64))
    moments.add(x[80:])
    assert moments.rows == 200
    assert torch.allclose(moments.total, x.double().t() @ x.double(), rtol=1e-4, atol=1e-3)
    found = gptq(weight, moments.total, scheme)
    found.check("w")
    wanted = reference(weight, moments.total, scheme)
    assert torch.allclose(found.dequantize().double(), wanted, atol=1e-5)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 64, True)])
def test_gptq_errs_far_less_on_its_inputs_than_rounding(scheme: Scheme) -> None:
    """单位阵的 H、或不把误差补给别的列，都过不了这一关。"""
    weight, x = torch.randn(32, 128), correlated(600, 128)
    moments = Moments(128, torch.device("cpu"))
    moments.add(x)

    def error(codes: Codes) -> float:
        return float((x @ (codes.dequantize() - weight).t()).square().mean())

    assert error(gptq(weight, moments.total, scheme)) < 0.6 * error(
        round_to_nearest(weight, scheme)
    )


def test_gptq_without_inputs_is_rounding_and_bad_inputs_are_named() -> None:
    weight = torch.randn(8, 64)
    nothing = torch.zeros(64, 64, dtype=torch.float64)
    found = gptq(weight, nothing, Scheme(8))
    assert torch.equal(found.codes, round_to_nearest(weight, Scheme(8)).codes)
    with pytest.raises(ValueError, match="c_fc: its inputs .* NaN"):
        gptq(weight, nothing * float("nan"), Scheme(8), "c_fc")
    with pytest.raises(ValueError, match="GPTQ is for 8 and 4 bits"):
        gptq(weight, nothing, Scheme(16))

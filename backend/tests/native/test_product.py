"""float32 的乘法，原生的文件直接读权重：与 float64 的孪生，一行与同批的行无关。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.native.build import TARGETS, load_native
from app.native.structs import float_weight

WIDTHS = (1, 3, 8, 17, 44, 101, 768)


@pytest.fixture(params=sorted(TARGETS), autouse=True)
def _target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_NATIVE", request.param)
    if load_native().handle is None:
        pytest.skip(load_native().reason)


def product(x: Tensor, weight: Tensor, bias: Tensor, threads: int = 1) -> Tensor:
    handle, held = load_native().handle, float_weight(weight)
    assert handle is not None
    y = torch.full((len(x), len(weight)), torch.nan)
    failed = handle.gpt2_product(
        held.address, x.data_ptr(), len(x), bias.data_ptr(), y.data_ptr(), threads
    )
    assert failed == 0
    return y


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("outs", (1, 5, 24, 53))
def test_it_is_the_product(width: int, outs: int) -> None:
    weight, bias = torch.randn(outs, width), torch.randn(outs)
    for rows in (1, 2, 3, 4, 5, 9, 200):
        x = torch.randn(rows, width)
        exact = x.double() @ weight.double().t() + bias.double()
        size = x.abs().double() @ weight.abs().double().t() + bias.abs().double()
        assert ((product(x, weight, bias) - exact).abs() <= 5e-7 * size).all(), rows


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_does_not_change_with_its_batch_or_threads(width: int) -> None:
    weight, bias, x = torch.randn(53, width), torch.randn(53), torch.randn(10, width)
    together = product(x, weight, bias, 3)
    alone = torch.cat([product(x[i : i + 1], weight, bias) for i in range(10)])
    assert torch.equal(alone, together)
    assert torch.equal(product(x[3:5], weight, bias), together[3:5])

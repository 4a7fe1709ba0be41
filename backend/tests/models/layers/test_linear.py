"""大的线性层走 oneDNN：与 float64 的 F.linear 同值同梯度，不论这台机器平时走不走它。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.transformer.layers import cpu_products as module
from app.models.transformer.layers.cpu_products import product
from app.models.transformer.layers.linear import linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "_vectors", lambda: "AVX512")


def error(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3, 70, 24), (80, 24)])
def test_values_and_gradients(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape).double(), torch.randn(40, 24).double(), torch.randn(40).double()]
    given = [x.float().requires_grad_() for x in exact[: 2 + biased]]
    twins = [x.clone().requires_grad_() for x in exact[: 2 + biased]]
    y, want = linear(*given), F.linear(*twins)
    assert type(y.grad_fn).__name__ == "_LargeBackward"
    push = torch.randn_like(y)
    y.backward(push)
    want.backward(push.double())
    assert error(y, want) < 2e-6
    for got, twin in zip(given, twins, strict=True):
        assert error(got.grad, twin.grad) < 2e-6


def test_a_frozen_weight_and_no_gradient() -> None:
    x, weight = torch.randn(70, 24, requires_grad=True), torch.randn(40, 24)
    linear(x, weight).sum().backward()
    assert error(x.grad, weight.sum(0).expand(70, -1)) < 2e-6
    with torch.no_grad():
        assert error(product(x, weight), (x.double() @ weight.double().t()).float()) < 2e-6


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, weight = torch.randn(70, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

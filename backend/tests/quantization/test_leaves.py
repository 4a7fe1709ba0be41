"""量化的叶子：与还原成浮点的同一层相同；装载、复制、换精度。"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from app.quantization.codes import Codes
from app.quantization.layers import QuantizedEmbedding, QuantizedGroupedLinear, QuantizedLinear
from app.quantization.matrix import QuantizedMatrix

from .test_kernels import matrix

every_bits = pytest.mark.parametrize("bits", (16, 8, 4))


def stacked(bits: int, experts: int, outs: int, width: int) -> Codes:
    each = [matrix(bits, outs, width) for _ in range(experts)]
    parts = {n: torch.stack([e.tensors()[n] for e in each]) for n in each[0].tensors()}
    return Codes(bits, group=each[0].group, **parts)


@every_bits
def test_linear_equals_the_dequantized_one(bits: int) -> None:
    codes, bias = matrix(bits, 48, 64), torch.randn(48)
    x = torch.randn(2, 5, 64)
    y = QuantizedLinear(codes, bias)(x)
    torch.testing.assert_close(y, F.linear(x, codes.dequantize(), bias), rtol=1e-2, atol=5e-1)
    assert y.shape == (2, 5, 48)
    assert QuantizedLinear(codes, None)(x[:0]).shape == (0, 5, 48)


@every_bits
def test_lookup_and_head_are_one_matrix(bits: int) -> None:
    codes = matrix(bits, 50, 64)
    wte = QuantizedEmbedding(codes)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(wte(ids), codes.dequantize()[ids])
    assert wte.num_embeddings == 50
    assert list(wte.state_dict())[0] == "weight.codes"
    logits = wte.weight.product(wte(ids))
    assert logits.shape == (2, 2, 50)
    assert wte.weight.codes.data_ptr() == codes.codes.data_ptr()


@every_bits
def test_experts_multiply_their_own_rows(bits: int) -> None:
    codes, bias = stacked(bits, 3, 16, 64), torch.randn(3, 16)
    layer = QuantizedGroupedLinear(codes, bias)
    x, ends = torch.randn(9, 64), torch.tensor([4, 4, 7])
    y = layer(x, ends)
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 7))):
        alone = QuantizedLinear(codes[expert], bias[expert])(x[rows])
        assert torch.equal(y[rows], alone)
    assert not y[7:].any()
    assert layer.weight.shape == (3, 16, 64)


@every_bits
def test_nothing_packed_is_saved_or_copied(bits: int) -> None:
    layer = QuantizedLinear(matrix(bits, 48, 64), torch.randn(48))
    x = torch.randn(3, 64)
    y = layer(x)
    stored = {f"weight.{name}" for name in matrix(bits, 2, 32).tensors()}
    assert set(layer.state_dict()) == stored | {"bias"}
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)  # noqa: S301


@every_bits
@pytest.mark.parametrize("assign", (True, False))
def test_loading_after_a_product_drops_what_was_prepared(bits: int, assign: bool) -> None:
    layer, other = (QuantizedLinear(matrix(bits, 48, 64), torch.randn(48)) for _ in range(2))
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer(x), other(x))


@every_bits
def test_built_on_meta_then_loaded(bits: int) -> None:
    real = QuantizedLinear(matrix(bits, 48, 64), torch.randn(48))
    codes = matrix(bits, 48, 64)
    parts = {name: tensor.to("meta") for name, tensor in codes.tensors().items()}
    empty = QuantizedLinear(Codes(bits, group=codes.group, **parts), torch.empty(48, device="meta"))
    empty.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), real(x))


def test_moving_rebuilds_and_casting_is_refused() -> None:
    layer = QuantizedLinear(matrix(8, 48, 64), torch.randn(48))
    x = torch.randn(3, 64)
    y = layer(x)
    assert torch.equal(layer.to("cpu")(x), y)
    with pytest.raises(ValueError, match="cannot cast 8-bit weights to torch.bfloat16"):
        layer.bfloat16()
    assert torch.equal(layer(x), y)


def test_what_the_weights_cannot_do_is_named() -> None:
    layer = QuantizedMatrix(matrix(8, 48, 64))
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="8-bit weights have no gradient"):
        layer.product(x.clone().requires_grad_())
    with torch.no_grad():
        layer.product(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="got torch.float64: pass x.float"):
        layer.product(x.double())
    with pytest.raises(ValueError, match="x has width 32, the 8-bit weights 64"):
        layer.product(x[:, :32])
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="torch.bfloat16: leave autocast off"),
    ):
        layer.product(x)


def test_compiled_it_is_the_twin() -> None:
    layer = QuantizedLinear(matrix(8, 48, 64), torch.randn(48))
    x = torch.randn(3, 64)
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(y, F.linear(x, layer.weight.dequantize(), layer.bias))

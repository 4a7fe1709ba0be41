"""量化的模型：每个乘法都换了，一行就是一行，与各种部件都合得来。"""

from __future__ import annotations

import copy

import pytest
import torch

from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.generation.lean_step import why_not_lean
from app.models.transformer import GPT2Model
from app.models.transformer.weights.own_folder import expected_shapes
from app.quantization.matrix import QuantizedMatrix, QuantizedStack
from app.quantization.model import (
    QuantizedModel,
    check_float,
    dequantize,
    matrices,
)
from tests.models.helpers import VARIANTS, relative, tiny_config, tokens

from .helpers import SCHEMES, float_model, quantized

FLOAT_KINDS = ("ln_1", "ln_2", "ln_1_post", "ln_2_post", "ln_f", "q_norm", "k_norm", "router")
# 16 位与 8 位的内核会取整激活，行数不同时舍入的次序也可不同。
CLOSE = 2e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_every_product_is_quantized(name: str) -> None:
    """形状的规则，而不是名字的规则：二维以上的除了位置与路由器都是码，一维的都不是。"""
    config = tiny_config(**VARIANTS[name])
    chosen = matrices(config)
    for each, shape in expected_shapes(GPT2Model, config).items():
        floats = len(shape) == 1 or each.endswith(".bias") or ".wpe." in each or ".router." in each
        assert (each in chosen) is not floats, each


@pytest.mark.parametrize("name", VARIANTS)
def test_no_float_product_is_left(name: str) -> None:
    model = quantized(float_model(**VARIANTS[name]), SCHEMES["int8"])
    for path, parameter in model.named_parameters():
        kind = path.split(".")
        assert (
            parameter.dim() == 1
            or kind[-1] == "bias"
            or "wpe" in kind
            or any(part in FLOAT_KINDS for part in kind)
        ), path
    count = sum(isinstance(m, QuantizedMatrix | QuantizedStack) for m in model.modules())
    assert count == len(matrices(model.config))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_what_its_dequantized_twin_computes(name: str, scheme: str) -> None:
    model = quantized(float_model(**VARIANTS[name]), SCHEMES[scheme])
    twin, ids = dequantize(model), tokens(2, 20)
    with torch.no_grad():
        assert relative(model(ids)["logits"], twin(ids)["logits"]) < CLOSE
        one, other = model(ids, targets=ids)["loss"], twin(ids, targets=ids)["loss"]
    assert one.item() == pytest.approx(other.item(), rel=CLOSE)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "name", ["pre", "local+global", "rope", "grouped", "moe", "untied", "sinks", "keel"]
)
def test_cached_equals_uncached_and_a_row_is_a_row(name: str, scheme: str) -> None:
    model, ids = quantized(float_model(**VARIANTS[name]), SCHEMES[scheme]), tokens(3, 16)
    with torch.no_grad():
        whole = model(ids)["logits"]
        cache = model.new_cache(3)
        parts = [
            model(ids[:, a:b], cache=cache, use_cache=True)["logits"]
            for a, b in ((0, 9), (9, 10), (10, 16))
        ]
        assert relative(torch.cat(parts, 1), whole) < 1e-3
        for row in range(3):
            assert relative(model(ids[row : row + 1])["logits"], whole[row : row + 1]) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["pre", "moe", "moe swiglu rope", "untied"])
def test_decoding_takes_the_lean_step_and_equals_the_forward(name: str, scheme: str) -> None:
    model, ids = quantized(float_model(**VARIANTS[name]), SCHEMES[scheme]), tokens(1, 6)
    assert why_not_lean(model) is None
    greedy = Options(max_new_tokens=8, sampling=SamplingConfig(temperature=0.0))
    made = complete(model, [ids[0].tolist()], greedy)[0].tokens
    with torch.no_grad():
        for token in made:
            assert token == model(ids)["logits"][0, -1].argmax()
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_padding_packing_and_the_int8_cache() -> None:
    model, ids = quantized(float_model(norm="pre"), SCHEMES["int4"]), tokens(1, 10)
    with torch.no_grad():
        alone = model(ids)["logits"]
        mask = torch.tensor([[0] * 4 + [1] * 10])
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
        assert relative(model(padded, attention_mask=mask)["logits"][:, 4:], alone) < 1e-3
        packed = torch.cat([tokens(1, 6), ids], 1)
        segments = torch.tensor([[0] * 6 + [1] * 10])
        assert relative(model(packed, segment_ids=segments)["logits"][:, 6:], alone) < 1e-3
        cache = model.new_cache(1, kv_dtype="int8")
        assert relative(model(ids, cache=cache, use_cache=True)["logits"], alone) < 5e-2


def test_lookup_and_tied_head_are_one_storage() -> None:
    model = quantized(float_model(norm="pre"), SCHEMES["int4"])
    names = [n for n in model.state_dict() if n.startswith(("embed.wte", "lm_head"))]
    assert names == ["embed.wte.weight.codes", "embed.wte.weight.scale"]
    ids = torch.arange(48)
    table = model.codes["embed.wte.weight"].dequantize()
    assert torch.equal(model.embed.wte(ids), table)
    x = torch.randn(5, 64)
    assert relative(model.head(x), x @ table.t()) < CLOSE
    # 改一行，两处都变：没有第二份。
    model.state_dict()["embed.wte.weight.codes"][7] = 0
    assert model.embed.wte(torch.tensor(7)).abs().max() == 0
    assert copy.deepcopy(model).head(x)[:, 7].abs().max() == 0


@pytest.mark.parametrize("name", ["pre", "moe", "moe swiglu rope", "untied"])
def test_counts_equal_the_float_model(name: str) -> None:
    model = float_model(**VARIANTS[name])
    small = quantized(model, SCHEMES["int8"])
    assert small.num_parameters() == model.num_parameters()
    assert small.active_parameters() == model.active_parameters()
    assert small.nbytes() < 0.4 * 4 * model.num_parameters()


def test_training_casting_and_float_work_are_refused() -> None:
    model = quantized(float_model(), SCHEMES["int8"])
    for wrong in (model.train, model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"float model|dequantize\(model\)"):
            wrong()
    with pytest.raises(ValueError, match=r"model\.head\(x\)"):
        _ = model.head_weight
    with pytest.raises(ValueError, match="upcycling needs float weights.*int8 x"):
        check_float(model, "upcycling")
    check_float(float_model(), "upcycling")
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 4))


def test_the_source_is_left_as_it_was() -> None:
    model, ids = float_model(), tokens(1, 8)
    with torch.no_grad():
        before = model(ids)["logits"]
        made = QuantizedModel.of(model, quantized(model, SCHEMES["int8"]).codes, "rtn")
        assert torch.equal(model(ids)["logits"], before)
    assert all(p.requires_grad for p in model.parameters())
    assert type(dequantize(made)) is GPT2Model

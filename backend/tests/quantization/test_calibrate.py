"""一层一层的 GPTQ、敏感度与预算：在一个记住了数据的小模型上。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.evaluation.compare_models import compare_quality
from app.evaluation.perplexity import TextTokens
from app.evaluation.sampled_windows import random_windows, sample_windows
from app.generation.speed import decode_speed
from app.models.transformer import GPT2Model
from app.models.transformer.weights.own_folder import expected_shapes
from app.quantization.calibrate import Calibrator
from app.quantization.codes import Scheme
from app.quantization.gptq import Moments, gptq
from app.quantization.model import VOCABULARY, QuantizedModel, dequantize, matrices
from app.quantization.rtn import round_to_nearest
from app.quantization.sensitivity import fit_budget, sensitivities, stored_bytes
from tests.models.helpers import VARIANTS

from .helpers import float_model, quantized

LOW = Scheme(4, 32)


def trained(**changes: Any) -> GPT2Model:
    """几十步，够让各层的输入有结构。"""
    torch.manual_seed(0)
    model = float_model(**({"norm": "pre", "dropout": 0.0} | changes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        ids = stream(8, 24, step)
        loss = model(ids[:, :-1], targets=ids[:, 1:])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def stream(rows: int, length: int, seed: int) -> Tensor:
    """每行一个步长的算术级数，偶尔出错。"""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1, 6, (rows, 1), generator=generator)
    start = torch.randint(0, 48, (rows, 1), generator=generator)
    noise = torch.rand(rows, length + 1, generator=generator) < 0.1
    ids = (start + step * torch.arange(length + 1)) % 48
    return torch.where(noise, (ids * 7) % 48, ids)


def plan(model: GPT2Model, low: Scheme) -> dict[str, Scheme]:
    names = matrices(model.config)
    return {name: Scheme(8) if name in VOCABULARY else low for name in names}


def test_gptq_of_the_model_halves_the_kl_of_rounding() -> None:
    model = trained()
    held = stream(40, 24, 999)
    codes = Calibrator(model, plan(model, LOW)).run(stream(64, 23, 5), lambda n: None)
    made = QuantizedModel.of(model, codes, "gptq")
    nearest = quantized(model, LOW)
    assert made.schemes == nearest.schemes
    kl, rounded = (compare_quality(model, each, held).kl for each in (made, nearest))
    assert 0 < kl < 0.6 * rounded


def test_the_first_matrix_is_gptq_of_its_own_inputs() -> None:
    model, ids, heard = float_model(norm="pre"), stream(10, 19, 1), []
    attention = model.h["0"].attn
    hook = attention.c_attn.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    moments = Moments(64, torch.device("cpu"))
    moments.add(heard[0])
    codes = Calibrator(model, plan(model, LOW)).run(ids, lambda n: None)
    wanted = gptq(attention.c_attn.weight, moments.total, LOW)
    found = codes["h.0.attn.c_attn.weight"]
    assert (found.dequantize() - wanted.dequantize()).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name", ["post", "keel", "rope", "local+global", "moe swiglu rope", "untied"]
)
def test_every_variant_calibrates_and_the_source_is_untouched(name: str) -> None:
    model = float_model(**VARIANTS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    done: list[int] = []
    work = Calibrator(model, plan(model, Scheme(4, 16)))
    codes = work.run(stream(12, 19, 2), done.append)
    assert (
        codes.keys() == matrices(model.config).keys()
        and sum(done) == 12 * 20 * model.config.n_layer
    )
    QuantizedModel.of(model, codes, "gptq")(stream(1, 9, 3))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_experts_without_tokens_are_rounded_and_counted() -> None:
    model = float_model(**VARIANTS["moe"])
    # 一个词元只去两个专家。
    ids = stream(1, 0, 2)
    with torch.no_grad():
        expert = model(ids, return_routing=(0,))["routing"][0][0]
    unused = [e for e in range(4) if not bool((expert == e).any())]
    assert len(unused) == 2
    work = Calibrator(model, plan(model, Scheme(4, 16)))
    codes = work.run(ids, lambda n: None)
    weight = model.h["0"].mlp.experts.c_fc.weight
    for e in unused:
        nearest = round_to_nearest(weight[e], Scheme(4, 16))
        assert torch.equal(codes["h.0.mlp.experts.c_fc.weight"][e].codes, nearest.codes)
    assert work.rounded == {
        "experts without tokens": 2 * len(unused) * model.config.n_layer, "the vocabulary": 1,
    }  # fmt: skip


def test_sensitivity_is_the_kl_of_one_matrix_and_leaves_the_model_alone() -> None:
    model, ids = trained(n_layer=2), stream(4, 23, 7)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    layers = {n: s for n, s in plan(model, LOW).items() if n not in VOCABULARY}
    cost = sensitivities(model, layers, ids[:, :-1], lambda n: None)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert cost.keys() == layers.keys() and min(cost.values()) > 0
    name = max(cost, key=cost.__getitem__)
    only = GPT2Model(model.config).eval()
    only.load_state_dict(before | {name: round_to_nearest(before[name], LOW).dequantize()})
    assert cost[name] == pytest.approx(compare_quality(model, only, ids).kl, rel=1e-3)


def test_the_budget_keeps_the_costly_in_eight_bits() -> None:
    model = float_model(norm="pre")
    shapes = expected_shapes(GPT2Model, model.config)
    low, high = plan(model, LOW), plan(model, Scheme(8))
    layers = [name for name in low if name not in VOCABULARY]
    cost = {name: float(i) * low[name].nbytes(shapes[name]) for i, name in enumerate(layers)}
    full = stored_bytes(shapes, {})
    assert full == 4 * model.num_parameters()
    least, most = (stored_bytes(shapes, each) / full for each in (low, high))
    assert fit_budget(shapes, low, high, cost, most + 1e-6) == high
    assert fit_budget(shapes, low, high, cost, least + 1e-6) == low
    middle = fit_budget(shapes, low, high, cost, (least + most) / 2)
    assert stored_bytes(shapes, middle) <= full * (least + most) / 2
    kept = [middle[name].bits == 8 for name in layers]
    # 代价按次序越来越大，所以留下 8 位的恰是最后那些。
    assert kept == sorted(kept) and 0 < sum(kept) < len(kept)
    with pytest.raises(ValueError, match=r"budget=0\.1 cannot be met: .* use --budget 0\.\d+"):
        fit_budget(shapes, low, high, cost, 0.1)
    made = quantized(model, LOW)
    assert stored_bytes(shapes, low) == made.nbytes()


def test_quality_of_a_model_with_itself_and_with_noise() -> None:
    model, windows = trained(n_layer=1), stream(6, 20, 3)
    same = compare_quality(model, model, windows)
    assert (same.kl, same.flips, same.noise, same.tokens) == (0.0, 0.0, 0.0, 6 * 20)
    with torch.no_grad():
        loss = model(windows[:, :-1], targets=windows[:, 1:])["loss"].item()
    assert same.nats[0] == pytest.approx(loss, rel=1e-5)
    other = dequantize(quantized(model, LOW))
    found = compare_quality(model, other, windows)
    with torch.no_grad():
        p, q = (m(windows[:, :-1])["logits"].log_softmax(-1) for m in (model, other))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.noise is not None and found.noise > 0
    assert compare_quality(model, other, windows[:1]).noise is None
    with torch.no_grad():
        other.h["0"].mlp.c_fc.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        compare_quality(model, other, windows)


def test_windows_are_spread_do_not_overlap_and_repeat() -> None:
    source = TextTokens(np.arange(1000, dtype=np.uint32))
    found = sample_windows(source, "data", 9, 20)
    assert found.shape == (20, 10) and torch.equal(found, sample_windows(source, "data", 9, 20))
    assert found[0, 0] == 0 and found[-1, -1] == 999
    assert (found[1:, 0] > found[:-1, -1]).all()
    assert sample_windows(source, "data", 9, 10**6).shape == (100, 10)
    with pytest.raises(ValueError, match="data has 9 tokens, fewer than one window of 10"):
        sample_windows(TextTokens(np.arange(9, dtype=np.uint32)), "data", 9, 4)
    assert torch.equal(random_windows(7, 3, 2), random_windows(7, 3, 2))


def test_speed_counts_tokens() -> None:
    model = float_model(n_layer=1, context_size=8)
    found = decode_speed((model, quantized(model, Scheme(8))), 1)
    assert len(found) == 2 and min(found) > 0
    with pytest.raises(ValueError, match="context_size=2 leaves no room"):
        decode_speed((float_model(n_layer=1, context_size=2),), 1)

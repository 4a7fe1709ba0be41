"""初始化的常数与深度行为。"""

from __future__ import annotations

import math

import pytest
import torch

from app.models.transformer import GPT2Model, create_gpt2_small
from app.models.transformer.block import residuals
from app.models.transformer.layers.init import (
    base_std,
    deepnorm_gain,
    initialize,
    residual_std,
    xavier,
)

from ..helpers import tiny_config

# 层数 -> (deepnorm α, deepnorm 增益, keel α, GPT-2 残差出口的标准差)，手工核对过的常数。
CONSTANTS = {
    6: (1.861210, 0.379918, 12, 0.00577350),
    12: (2.213364, 0.319472, 24, 0.00408248),
    24: (2.632148, 0.268642, 48, 0.00288675),
    36: (2.912951, 0.242746, 72, 0.00235702),
    48: (3.130169, 0.225901, 96, 0.00204124),
}


@pytest.mark.parametrize("depth", CONSTANTS)
def test_constants(depth: int) -> None:
    alpha, gain, keel, std = CONSTANTS[depth]
    config = tiny_config(n_layer=depth, n_embed=768, n_head=12)
    attn, mlp = residuals(config.replace(norm="deepnorm"), 1)
    assert attn.alpha == mlp.alpha == pytest.approx(alpha, abs=1e-6)
    assert deepnorm_gain(depth) == pytest.approx(gain, abs=1e-6)
    assert {r.alpha for r in residuals(config.replace(norm="keel"), 1)} == {keel}
    assert residual_std(config) == pytest.approx(std, abs=1e-8)


def test_keel_first_layer_exception() -> None:
    attn, mlp = residuals(tiny_config(norm="keel"), 0)
    assert (attn.inner, attn.outer, attn.alpha) == (True, False, 1.0)
    assert (mlp.inner, mlp.outer, mlp.alpha) == (True, True, 1.0)


def test_std_grows_only_where_the_width_is_small() -> None:
    wide = [tiny_config(n_embed=w, n_head=4) for w in (768, 1024, 1600)]
    assert {base_std(c) for c in wide} == {0.02}
    assert base_std(tiny_config(n_embed=192)) == pytest.approx(0.04)


@pytest.mark.parametrize("norm", ["pre", "post", "keel"])
def test_measured_statistics(norm: str) -> None:
    config = tiny_config(n_embed=256, n_layer=2, vocab_size=500, norm=norm)
    model, std = GPT2Model(config), 0.02 * math.sqrt(3)
    block = model.h["1"]
    for weight in (model.embed.wte.weight, block.attn.c_attn.weight, block.mlp.c_fc.weight):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
        assert weight.std().item() == pytest.approx(std / 2, rel=0.02)
    assert not block.mlp.c_fc.bias.any() and not block.ln_1.bias.any()
    assert (block.ln_1.weight == 1).all()


def test_deepnorm_scales_v_but_not_q_and_k() -> None:
    model = GPT2Model(tiny_config(n_embed=256, norm="deepnorm", n_layer=6))
    q, k, v = model.h["0"].attn.c_attn.weight.detach().chunk(3)
    unit = math.sqrt(2 / (256 + 256))
    assert q.std().item() == pytest.approx(unit, rel=0.02)
    assert k.std().item() == pytest.approx(unit, rel=0.02)
    assert v.std().item() == pytest.approx(unit * deepnorm_gain(6), rel=0.02)


def test_deepnorm_takes_gate_and_up_as_two_matrices() -> None:
    config = tiny_config(n_embed=256, norm="deepnorm", n_layer=6, activation="swiglu")
    fc = GPT2Model(config).h["0"].mlp.c_fc.weight.detach()
    unit = math.sqrt(2 / (256 + config.mlp_hidden))
    for part in fc.chunk(2):
        assert part.std().item() == pytest.approx(unit * deepnorm_gain(6), rel=0.02)


def test_a_module_that_says_nothing_of_its_initialisation_is_refused() -> None:
    model = GPT2Model(tiny_config())
    model.add_module("extra", torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Linear would keep torch's own initialisation"):
        initialize(model, model.config)


def test_same_seed_same_model_and_meta_is_safe() -> None:
    torch.manual_seed(7)
    first = GPT2Model(tiny_config())
    torch.manual_seed(7)
    second = GPT2Model(tiny_config())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    with torch.device("meta"):
        assert all(p.is_meta for p in create_gpt2_small().parameters())


def gradient_norms(norm: str, depth: int) -> list[float]:
    """各层 mlp.c_proj（权重与偏置）的梯度范数，Xavier 初始化。"""
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=65, context_size=64, n_layer=depth, n_embed=64, norm=norm, dropout=0.0
    )
    model = GPT2Model(config)
    with torch.no_grad():
        for block in model.h.values():
            xavier(block, config, deepnorm_gain(depth) if norm == "deepnorm" else 1.0)
    ids = torch.randint(0, 65, (16, 65))
    model(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())["loss"].backward()
    return [
        math.hypot(*(p.grad.norm().item() for p in block.mlp.c_proj.parameters()))
        for block in model.h.values()
    ]


@pytest.mark.slow
def test_gradient_at_initialisation_by_depth() -> None:
    """pre 随深度变小、post 不变（arXiv:2002.04745）；deepnorm 与 keel 各层均匀。"""
    pre, post = ({d: gradient_norms(n, d)[-1] for d in (6, 48)} for n in ("pre", "post"))
    assert pre[48] < 0.5 * pre[6]
    assert 0.5 < post[48] / post[6] < 2
    for depth in (12, 48):
        deepnorm, keel = gradient_norms("deepnorm", depth), gradient_norms("keel", depth)
        assert abs(deepnorm[0] / deepnorm[-1] - 1) < 0.05
        # keel 的第一层有例外（α = 1），从第二层比起。
        assert abs(keel[1] / keel[-1] - 1) < 0.1
    assert gradient_norms("pre", 12)[0] > 2.5 * gradient_norms("pre", 12)[-1]

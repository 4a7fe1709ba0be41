"""混合专家在整个模型里：填充、均衡损失、缓存、重算、编译、初始化与存取。"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from app.models.transformer import GPT2Model, MoEConfig
from app.models.transformer.experts.moe import Experts
from app.models.transformer.experts.router import ROUTER_STD, Router
from app.models.transformer.layers.init import deepnorm_gain, residual_std

from ..helpers import MIXED, ROUTERS, relative, tiny_config, tiny_model, tokens


@pytest.fixture(params=["softmax_topk", "sigmoid", "switch"])
def model(request: pytest.FixtureRequest) -> GPT2Model:
    return sharp(tiny_model(**{**MIXED, **ROUTERS[request.param]}))


def sharp(model: GPT2Model) -> GPT2Model:
    """路由器的权重大到选择分明。"""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight.normal_()
    return model


def test_padding_is_neither_routed_nor_counted(model: GPT2Model) -> None:
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5], mask[1, 9:] = 0, 0
    out = model(ids, attention_mask=mask, targets=ids, return_routing=(1,))
    expert, weight = out["routing"][1]
    k = model.config.moe_top_k
    assert expert.shape == weight.shape == (2, 12, k)
    assert (expert[mask == 0] == 4).all() and (expert[mask == 1] < 4).all()
    assert (out["expert_load"].sum(1) == int(mask.sum()) * k).all()
    alone = [model(ids[:1, 5:], targets=ids[:1, 5:]), model(ids[1:, :9], targets=ids[1:, :9])]
    assert torch.equal(out["expert_load"], sum(one["expert_load"] for one in alone))
    junk = torch.where(mask == 1, ids, (ids + 7) % 37)
    other = model(junk, attention_mask=mask, targets=ids)
    assert (other["aux_loss"] - out["aux_loss"]).abs() < 1e-12


def test_a_row_of_padding_alone_is_no_division_by_zero(model: GPT2Model) -> None:
    out = model(tokens(1, 4), attention_mask=torch.zeros(1, 4, dtype=torch.long))
    assert not out["expert_load"].any() and out["aux_loss"].item() == 0.0


def test_aux_loss_is_the_weighted_mean_over_the_layers() -> None:
    coefficients = MoEConfig(aux_loss_coef=0.3, z_loss_coef=0.07, layers=(0, 2))
    model = sharp(tiny_model(**MIXED, moe=coefficients))
    ids, caught = tokens(2, 12), []
    for i in (0, 2):
        model.h[str(i)].mlp.router.register_forward_hook(lambda m, a, out: caught.append(out))
    out = model(ids, targets=ids)
    wanted = torch.zeros((), dtype=torch.float64)
    for choice in caught:
        p = choice.logits.softmax(-1)
        f = F.one_hot(choice.expert, 4).sum(1).double().mean(0)
        wanted = wanted + 0.3 * 4 * (f * p.mean(0)).sum()
        wanted = wanted + 0.07 * choice.logits.logsumexp(-1).square().mean()
    assert out["aux_loss"].item() == pytest.approx(wanted.item() / 2, abs=1e-12)
    assert out["expert_load"].shape == (2, 4) and out["expert_dropped"].tolist() == [0, 0]
    plain = model(ids)["logits"].flatten(0, 1)
    assert out["loss"].item() == pytest.approx(F.cross_entropy(plain, ids.flatten()).item())


def test_no_statistics_with_a_cache_or_without_experts(model: GPT2Model) -> None:
    with torch.no_grad():
        out = model(tokens(1, 5), use_cache=True, return_routing=(0,))
    assert out.keys() == {"logits", "routing"}
    assert tiny_model()(tokens(1, 5)).keys() == {"logits"}
    with pytest.raises(ValueError, match=r"return_routing names layer 1, .* \[\] \(moe_num"):
        tiny_model()(tokens(1, 5), return_routing=(1,))


def test_capacity_drops_in_training_only() -> None:
    model = sharp(tiny_model(**MIXED, dropout=0.0, moe=MoEConfig(capacity_factor=0.5)))
    ids = tokens(2, 12)
    free = model(ids, targets=ids)
    assert not free["expert_dropped"].any()
    model.train()
    out = model(ids, targets=ids, return_routing=(0,))
    limit = math.ceil(0.5 * 24 * 2 / 4)
    for load, dropped in zip(out["expert_load"], out["expert_dropped"], strict=True):
        assert dropped == (load - limit).clamp(min=0).sum() > 0
    assert (out["routing"][0][0] == 4).sum() == out["expert_dropped"][0]


@pytest.mark.parametrize("pattern", [None, "local(4) | global(2)"])
def test_activation_checkpointing_neither_counts_twice_nor_loses_the_gradient(
    pattern: str | None,
) -> None:
    model = sharp(tiny_model(**MIXED, attention_pattern=pattern))
    ids, results = tokens(2, 12), []
    for wrapped in (False, True):
        model.zero_grad()
        if wrapped:
            for block in model.h.values():
                plain = block.forward
                block.forward = lambda x, ctx, plain=plain: checkpoint(
                    plain, x, ctx, use_reentrant=False
                )
        out = model(ids, targets=ids)
        before = out["expert_load"].clone()
        (out["loss"] + 5 * out["aux_loss"]).backward()
        assert torch.equal(before, out["expert_load"]) and (before.sum(1) == 48).all()
        results.append([before, *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for a, b in zip(*results, strict=True):
        assert relative(b.double(), a.double()) < 1e-12


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid"])
def test_compiled_blocks_are_the_eager_ones(name: str) -> None:
    """每块一张图、不断图，前向、负载与梯度都相同。"""
    model = sharp(tiny_model(**{**MIXED, **ROUTERS[name]}, n_layer=2))
    ids, mask, results = tokens(2, 12), torch.ones(2, 12, dtype=torch.long), []
    mask[0, 8:] = 0
    for compiled in (False, True):
        if compiled:
            for block in model.h.values():
                block.compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        out = model(ids, targets=ids, attention_mask=mask)
        (out["loss"] + 5 * out["aux_loss"]).backward()
        grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        results.append([out["loss"], out["aux_loss"], out["expert_load"].double(), *grads])
    for a, b in zip(*results, strict=True):
        assert relative(b, a) < 1e-12


def test_autocast_runs_the_experts_in_bfloat16() -> None:
    model = sharp(tiny_model(torch.float32, **MIXED))
    seen = []
    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    ids = tokens(2, 12)
    wanted = model(ids)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, targets=ids, logits_to_keep=12)
    (out["loss"] + out["aux_loss"]).backward()
    assert set(seen[3:]) == {torch.bfloat16} and out["aux_loss"].dtype == torch.float32
    assert relative(out["logits"].float(), wanted) < 0.1


# ---- 初始化、参数量 ----


def test_experts_start_like_the_dense_mlp() -> None:
    config = tiny_config(n_embed=256, n_layer=2, norm="pre", moe_num_experts=4)
    model = GPT2Model(config)
    moe = model.h["1"].mlp
    assert moe.experts.c_fc.weight.std().item() == pytest.approx(0.02 * math.sqrt(3), rel=0.02)
    assert moe.experts.c_proj.weight.std().item() == pytest.approx(residual_std(config), rel=0.02)
    assert moe.router.weight.std().item() == pytest.approx(ROUTER_STD, rel=0.1)
    assert not moe.experts.c_fc.bias.any()
    deep = GPT2Model(config.replace(norm="deepnorm")).h["0"].mlp.experts
    unit = math.sqrt(2 / (256 + config.expert_hidden)) * deepnorm_gain(2)
    for weight in (*deep.c_fc.weight, *deep.c_proj.weight):
        assert weight.std().item() == pytest.approx(unit, rel=0.02)


def test_active_parameters() -> None:
    dense = GPT2Model(tiny_config())
    assert dense.active_parameters() == dense.num_parameters()
    model = GPT2Model(tiny_config(**MIXED, moe=MoEConfig(shared_experts=1, layers=(1,))))
    idle = sum(p[2:].numel() for p in model.h["1"].mlp.experts.parameters())
    assert model.num_parameters() - model.active_parameters() == idle


def test_the_selection_bias_is_saved_and_loaded(tmp_path: Any) -> None:
    model = tiny_model(**MIXED, moe=MoEConfig(router="sigmoid"))
    bias = model.h["2"].mlp.router.selection_bias
    bias.copy_(torch.randn(4))
    model.save_pretrained(tmp_path)
    again = GPT2Model.from_pretrained(tmp_path)
    assert torch.equal(again.h["2"].mlp.router.selection_bias, bias)
    # 另一个专家数：点名两个形状。
    text = (tmp_path / "config.json").read_text().replace('num_experts": 4', 'num_experts": 5')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"has shape \(4, .*but the config says \(5, "):
        GPT2Model.from_pretrained(tmp_path)

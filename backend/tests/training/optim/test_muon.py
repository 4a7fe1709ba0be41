"""Muon：迭代对照奇异值分解，整步对照公式与 torch.optim.Muon，分组，存取。"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from app.models.transformer import GPT2Config, GPT2Model
from app.training import trainer as trainer_module
from app.training.config import OptimConfig
from app.training.optim.build import build_optimizer
from app.training.optim.muon import (
    ADAMW_RMS,
    COEFFICIENTS,
    ITERATIONS,
    MOMENTUM,
    iterate,
    iterate_gram,
    orthogonalize,
)
from app.training.saving.state import load_optimizer_tensors, optimizer_tensors

from ..conftest import Make, rows, train

MUON = OptimConfig(name="muon", lr=0.01, muon_lr=0.02, weight_decay=0.5, grad_clip=0)


def tiny(**changes: Any) -> GPT2Model:
    torch.manual_seed(0)
    values = {"vocab_size": 13, "context_size": 6, "n_layer": 2, "n_head": 4, "n_embed": 16}
    return GPT2Model(GPT2Config(**(values | {"dropout": 0.0} | changes))).double()


def give_gradients(model: GPT2Model, seed: int = 1) -> None:
    source = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=source, dtype=p.dtype)


def by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """同一个多项式，作用在奇异值上。"""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (1, 5)])
def test_iteration_acts_on_singular_values_alone(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    for matrix, found in zip(matrices, orthogonalize(matrices), strict=True):
        torch.testing.assert_close(found, by_svd(matrix), rtol=1e-9, atol=1e-9)


def test_result_is_nearly_orthogonal_and_blind_to_scale() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 16, 64, dtype=torch.float64)
    found = orthogonalize(matrices)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    torch.testing.assert_close(orthogonalize(1e-3 * matrices), found)
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


def unit(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return x / x.norm(dim=(-2, -1), keepdim=True)


def test_iterating_on_the_small_gram_is_the_same_polynomial() -> None:
    torch.manual_seed(0)
    x = unit(3, 12, 48)
    torch.testing.assert_close(iterate_gram(x), iterate(x), rtol=0.0, atol=1e-12)


def test_the_gram_stays_within_float32_where_singular_values_are_tiny() -> None:
    """秩亏与 1e-4 的奇异值：G 的舍入放大之后仍不过文中说的 0.02。"""
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(unit(2, 32, 128), full_matrices=False)
    s[:, 8:16], s[:, 16:] = 1e-4, 0.0
    x = (u * s[:, None]) @ vh
    found = iterate_gram(x.float()).double()
    torch.testing.assert_close(found, iterate(x), rtol=0.0, atol=0.02)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
def test_a_matrix_has_the_same_bits_alone_and_among_others(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, *shape)
    every = orthogonalize(matrices)
    for i in range(5):
        assert torch.equal(orthogonalize(matrices[i : i + 1])[0], every[i])


def test_each_parameter_has_the_update_that_suits_it() -> None:
    model = tiny(tie_weights=False)
    optimizer, why = build_optimizer(model, MUON)
    muon, decay, free = optimizer.param_groups
    assert set(muon["names"]) == {
        f"h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {"embed.wte.weight", "embed.wpe.weight", "lm_head.weight"} == set(decay["names"])
    assert all(p.ndim == 1 for p in free["params"]) and free["weight_decay"] == 0.0
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in members}) == len(members) == len(list(model.parameters()))
    assert [g["initial_lr"] for g in (muon, decay, free)] == [0.02, 0.01, 0.01]
    assert why.startswith("Muon for 8 matrices (peak lr 0.02), fused AdamW")
    plain, _ = build_optimizer(model, OptimConfig(name="muon", lr=0.01))
    assert plain.param_groups[0]["lr"] == 0.01


def test_one_step_is_the_formula() -> None:
    """float64：Nesterov 动量、分块正交化、缩放到 AdamW 的大小、解耦的衰减；其余是 AdamW。"""
    model = tiny(n_kv_head=2, activation="swiglu")
    optimizer, _ = build_optimizer(model, MUON)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    give_gradients(model)
    optimizer.step()
    hidden = model.config.mlp_hidden
    parts = {"attn.c_attn": [16, 8, 8], "mlp.c_fc": [hidden, hidden]}
    for name, p in model.named_parameters():
        assert p.grad is not None
        if name.startswith("h.") and p.ndim == 2:
            rows = parts.get(name.split(".", 2)[2].removesuffix(".weight"), [len(p)])
            # 第一步的动量是 (1 - μ)·g，向前看一步后仍与 g 同向。
            pieces = [by_svd(g) * ADAMW_RMS * math.sqrt(max(g.shape)) for g in p.grad.split(rows)]
            wanted = before[name] * (1 - 0.02 * 0.5) - 0.02 * torch.cat(pieces)
        else:
            shrink = 1 - 0.01 * 0.5 if p.ndim == 2 else 1.0
            wanted = before[name] * shrink - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-8, atol=1e-10)


def test_agrees_with_the_one_in_torch() -> None:
    """五步之后与 torch.optim.Muon 只差它的 bfloat16；分块的矩阵除外。"""
    model = tiny()
    twin = copy.deepcopy(model)
    optimizer, _ = build_optimizer(model, MUON)
    named = [(n, p) for n, p in twin.named_parameters() if n.startswith("h.") and p.ndim == 2]
    reference = torch.optim.Muon(
        [p for _, p in named], lr=0.02, weight_decay=0.5, momentum=MOMENTUM,
        ns_coefficients=COEFFICIENTS, ns_steps=ITERATIONS, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    start = {n: p.detach().clone() for n, p in named}
    for seed in range(5):
        give_gradients(model, seed)
        give_gradients(twin, seed)
        optimizer.step()
        reference.step()
    ours = dict(model.named_parameters())
    for name, p in named:
        error = (ours[name] - p).norm() / (p - start[name]).norm()
        assert (error > 0.05) if "c_attn" in name else (error < 0.02), name


def test_update_is_as_large_as_that_of_adamw() -> None:
    model = tiny(n_embed=64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, _ = build_optimizer(model, OptimConfig(name="muon", lr=1.0, weight_decay=0.0))
    give_gradients(model)
    optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith("h.") and p.ndim == 2:
            rms = float((p - before[name]).detach().square().mean().sqrt())
            assert 0.12 < rms < 0.28, name


def test_a_matrix_without_gradient_stays() -> None:
    model = tiny()
    optimizer, _ = build_optimizer(model, MUON)
    give_gradients(model)
    still = model.get_parameter("h.0.mlp.c_fc.weight")
    still.grad, before = None, still.detach().clone()
    optimizer.step()
    assert torch.equal(still, before) and still not in optimizer.state


def test_state_returns_bit_for_bit() -> None:
    """按名字存取之后，接下来的几步与没存过的逐位相等；学习率仍可照组改。"""
    model = tiny()
    optimizer, _ = build_optimizer(model, MUON)
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    saved = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    assert "momentum_buffer/h.1.mlp.c_fc.weight" in saved and "exp_avg/embed.wte.weight" in saved
    twin = copy.deepcopy(model)
    again, _ = build_optimizer(twin, MUON)
    load_optimizer_tensors(twin, again, saved)
    for seed in range(3, 6):
        for each, opt in ((model, optimizer), (twin, again)):
            give_gradients(each, seed)
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] / seed
            opt.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_closure_is_called_once() -> None:
    model, calls = tiny(), []
    optimizer, _ = build_optimizer(model, MUON)

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        give_gradients(model)
        return 3.0

    assert optimizer.step(closure) == 3.0 and calls == [True]


def test_each_group_follows_the_schedule_from_its_own_peak(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = trainer_module.build_optimizer, []

    def build(model: Any, config: Any) -> Any:
        optimizer, why = real(model, config)
        optimizer.register_step_pre_hook(
            lambda *args: seen.append([group["lr"] for group in optimizer.param_groups])
        )
        return optimizer, why

    monkeypatch.setattr(trainer_module, "build_optimizer", build)
    config = make(optim=MUON)
    train(config)
    rates = [row["lr"] for row in rows(config.out)]
    assert seen == [[pytest.approx(2 * rate), rate, rate] for rate in rates]

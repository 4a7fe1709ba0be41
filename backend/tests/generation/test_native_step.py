"""原生的一步与前向相符，一行与同批的行、线程数无关；不能走、算得不对时不走。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from app.generation import native_step
from app.generation.lean_step import LeanStep
from app.generation.native_step import MOST_ROWS, NativeStep, why_not_native
from app.models.transformer import GPT2Model, KVCache, RoPEConfig
from app.models.transformer.attention import Attention
from app.models.transformer.layers.linear import Linear
from app.models.transformer.layers.norm import RMSNorm
from app.native.build import TARGETS, load_native

from ..models.helpers import tiny_model, tokens
from ..quantization.helpers import SCHEMES, float_model, quantized

# 每一处分岔都有一个：归一化的四种位置、两种、激活、门、偏置、键值头、位置、不共享的头、两种旋转。
KINDS: dict[str, dict[str, Any]] = {
    "pre": {"norm": "pre"},
    "post, relu": {"norm": "post", "activation": "relu"},
    "deepnorm, rms, silu": {"norm": "deepnorm", "norm_type": "rmsnorm", "activation": "silu"},
    "keel, gelu": {"norm": "keel", "activation": "gelu"},
    "no bias, relu2": {"norm": "pre", "bias": False, "activation": "relu2"},
    "grouped heads": {"norm": "pre", "n_kv_head": 2},
    "no position, own head": {"norm": "pre", "position": "none", "tie_weights": False},
    "rope, normed heads, grouped": {
        "norm": "pre",
        "position": "rope",
        "qk_norm": True,
        "n_kv_head": 2,
    },
    "interleaved yarn": {
        "norm": "pre",
        "position": "rope",
        "rope": RoPEConfig(layout="interleaved", scaling="yarn", factor=4.0, original_context=8),
    },
    "swiglu, rms": {"norm": "pre", "activation": "swiglu", "norm_type": "rmsnorm"},
    "odd width": {"norm": "pre", "n_embed": 44, "n_head": 4, "vocab_size": 53},
}


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GPT2_NATIVE", request.param)
    if load_native().handle is None:
        pytest.skip(load_native().reason)
    return request.param


@pytest.fixture
def native() -> None:
    if load_native().handle is None:
        pytest.skip(load_native().reason)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def filled(model: GPT2Model, ids: Tensor, **options: object) -> KVCache:
    cache = model.new_cache(len(ids), **options)
    with torch.inference_mode():
        model(ids, cache=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def steps(model: GPT2Model, cache: KVCache, chosen: Tensor, count: int = 4) -> Tensor:
    """count 步都喂 chosen，直接用原生的一步 -> (count, B, V)。"""
    step, native = LeanStep(model), NativeStep(model)
    found = []
    for _ in range(count):
        assert native.takes(len(chosen), cache)
        found.append(step._step(chosen, cache, native))
    return torch.stack(found)


def assert_follows(model: GPT2Model, rows: int, tolerance: float) -> None:
    assert why_not_native(model) is None
    ids, chosen = tokens(rows, 5), tokens(rows)
    slow, fast = filled(model, ids), filled(model, ids)
    got = steps(model, fast, chosen)
    for logits in got:
        with torch.inference_mode():
            out = model(chosen[:, None], cache=slow, use_cache=True, logits_to_keep=1)
        wanted = out["logits"][:, -1]
        assert (logits - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert slow.uniform == fast.uniform == 9
    for a, b in zip(slow.keys + slow.values, fast.keys + fast.values, strict=True):
        assert torch.allclose(
            a[:, :, :9], b[:, :, :9], atol=tolerance * float(a[:, :, :9].abs().max())
        )


@pytest.mark.parametrize("name", KINDS)
def test_it_follows_the_forward(target: str, name: str) -> None:
    assert_follows(tiny_model(torch.float32, **KINDS[name]), 3, 2e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_follows_quantized_weights(target: str, scheme: str) -> None:
    model = quantized(float_model(norm="pre"), SCHEMES[scheme])
    if scheme == "int4 asymmetric":
        assert "is multiplied by another kernel" in str(why_not_native(model))
    else:
        assert_follows(model, 3, 2e-6 if scheme == "fp16" else 2e-3)


@pytest.mark.parametrize("scheme", ["float32", "fp16", "int8", "int4"])
def test_a_row_does_not_change_with_its_batch_or_threads(
    target: str, scheme: str, three_threads: None
) -> None:
    model = float_model(norm="pre")
    model = model if scheme == "float32" else quantized(model, SCHEMES[scheme])
    ids, chosen = tokens(1, 6).repeat(9, 1), tokens(9)
    start = filled(model, ids[:1])
    caches = [filled(model, ids), *(filled(model, ids[:1]) for _ in range(9))]
    for cache in caches:
        for layer, (keys, values) in enumerate(start.stores):
            cache.keys[layer][:, :, :6] = keys.parts[0][:, :, :6]
            cache.values[layer][:, :, :6] = values.parts[0][:, :, :6]
    together = steps(model, caches[0], chosen)
    torch.set_num_threads(1)
    alone = [steps(model, cache, chosen[i : i + 1]) for i, cache in enumerate(caches[1:])]
    assert torch.equal(torch.cat(alone, 1), together)


def test_it_takes_only_caches_that_it_can_read(native: None) -> None:
    model = tiny_model(torch.float32, norm="pre", attention_pattern="sinks(2, 4)", position="none")
    step, ids = NativeStep(model), tokens(1, 3)
    assert step.takes(1, filled(model, ids))
    assert not step.takes(MOST_ROWS + 1, filled(model, ids))
    assert not step.takes(1, filled(model, ids, kv_dtype="int8"))
    assert not step.takes(1, filled(model, tokens(1, 9)))  # 最早的已看不见
    assert not step.takes(1, filled(tiny_model(torch.float32), ids, max_len=3))


def test_a_forward_that_was_changed_is_seen_and_said(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, ctx: 1.01 * real(self, x, ctx))
    model = tiny_model(torch.float32, norm="pre")
    ids, chosen = tokens(2, 4), tokens(2)
    slow, fast = filled(model, ids), filled(model, ids)
    step = LeanStep(model)
    with pytest.warns(UserWarning, match="native decoding step differs from the model's forward"):
        step(chosen, fast)
    fast.truncate(4)
    with torch.inference_mode():
        out = model(chosen[:, None], cache=slow, use_cache=True)
    assert torch.equal(step(chosen, fast), out["logits"][:, -1])


def test_the_native_step_is_the_one_that_runs(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(torch.float32, norm="pre")
    calls = []
    real = native_step.NativeStep.__call__
    monkeypatch.setattr(
        native_step.NativeStep, "__call__", lambda *args: calls.append(1) or real(*args)
    )
    step, cache = LeanStep(model), filled(model, tokens(2, 4))
    for _ in range(3):
        step(tokens(2), cache)
    assert len(calls) == 3


def test_nan_stays_nan(native: None) -> None:
    model = tiny_model(torch.float32, norm="pre")
    with torch.no_grad():
        model.embed.wte.weight[3] = torch.nan
    cache = filled(model, tokens(2, 4).clamp(min=4))
    logits = steps(model, cache, torch.tensor([3, 5]), 1)[0]
    assert logits[0].isnan().all() and logits[1, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moe_num_experts": 4}, "have experts"),
        ({"attention_backend": "reference"}, "attention_backend='reference'"),
    ],
)
def test_why_not(native: None, changes: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not_native(tiny_model(torch.float32, **changes)))


def test_why_not_other_types_or_no_file(monkeypatch: pytest.MonkeyPatch, native: None) -> None:
    assert "is torch.float64" in str(why_not_native(tiny_model(torch.float64)))
    monkeypatch.setenv("GPT2_NATIVE", "off")
    assert why_not_native(tiny_model(torch.float32)) == "GPT2_NATIVE=off"


def test_why_not_another_leaf(native: None) -> None:
    model = tiny_model(torch.float32, norm="pre")
    model.h["1"].mlp.c_fc.__class__ = type("Adapted", (Linear,), {})
    assert why_not_native(model) == "h.1.mlp.c_fc is a Adapted"
    model.h["1"].mlp.c_fc.__class__ = Linear
    model.ln_f.__class__ = type("MyNorm", (torch.nn.LayerNorm,), {})
    assert why_not_native(model) == "ln_f is a MyNorm"


def test_why_not_another_norm_of_the_heads(native: None) -> None:
    model = tiny_model(torch.float32, norm="pre", qk_norm=True)
    model.h["0"].attn.k_norm.__class__ = type("MyNorm", (RMSNorm,), {})
    assert why_not_native(model) == "h.0.attn.k_norm is a MyNorm"

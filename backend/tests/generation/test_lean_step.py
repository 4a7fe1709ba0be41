"""逐个算子的一步与 GPT2Model.forward 逐位相同；不能走时说出理由。原生的一步见 test_native_step。"""

from __future__ import annotations

import pytest
import torch

from app.generation.lean_step import LeanStep, why_not_lean
from app.models.transformer import GPT2Model, KVCache
from app.models.transformer.attention import Attention
from app.models.transformer.layers.cpu_products import FEW_ROWS

from ..models.helpers import VARIANTS, tiny_model, tokens


@pytest.fixture(autouse=True)
def _by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_NATIVE", "off")


def filled(model: GPT2Model, rows: int, length: int, **options: object) -> list[KVCache]:
    """两个喂了同样提示的缓存。"""
    ids = tokens(rows, length)
    caches = [model.new_cache(rows, **options) for _ in range(2)]
    for cache in caches:
        with torch.inference_mode():
            model(ids, cache=cache, use_cache=True, logits_to_keep=1)
    return caches


def follow(model: GPT2Model, rows: int, **options: object) -> None:
    slow, fast = filled(model, rows, 5, **options)
    step = LeanStep(model)
    for _ in range(15):
        chosen = tokens(rows)
        with torch.inference_mode():
            out = model(chosen[:, None], cache=slow, use_cache=True, logits_to_keep=1)
        assert torch.equal(step(chosen, fast), out["logits"][:, -1])
    assert slow.uniform == fast.uniform == 20


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_lean_step_is_the_forward_to_the_bit(name: str, dtype: torch.dtype, rows: int) -> None:
    follow(tiny_model(dtype, **VARIANTS[name]), rows)


def test_it_follows_int8_keys_and_rings_that_wrap() -> None:
    model = tiny_model(torch.float32, attention_pattern="sinks(2, 4)", position="none")
    follow(model, 2, kv_dtype="int8", max_chunk=1)
    follow(model, 2, ring=False)


def test_half_precision_takes_the_plain_products() -> None:
    follow(tiny_model(torch.bfloat16, norm="pre"), 2)


def test_it_sees_weights_that_change_in_place() -> None:
    model = tiny_model(torch.float32)
    step = LeanStep(model)
    slow, fast = filled(model, 1, 4)
    chosen = tokens(1)
    with torch.no_grad():
        model.h["1"].mlp.c_fc.weight.mul_(1.5)
        out = model(chosen[:, None], cache=slow, use_cache=True)
    assert torch.equal(step(chosen, fast), out["logits"][:, -1])


def test_a_step_that_fails_leaves_the_cache_as_it_was() -> None:
    model = tiny_model(torch.float32)
    cache = filled(model, 1, 4)[0]
    with pytest.raises(ValueError, match="outside 0..36"):
        LeanStep(model)(torch.tensor([37]), cache)
    assert cache.uniform == 4


def test_more_rows_than_the_few_row_products_take() -> None:
    follow(tiny_model(torch.float32, norm="pre"), FEW_ROWS + 6)


def test_a_forward_that_was_changed_is_seen_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """有人改了 attention.py：续写照他改的算，并且说出来。"""
    real = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, ctx: 1.01 * real(self, x, ctx))
    model = tiny_model(torch.float32)
    slow, fast = filled(model, 2, 4)
    step = LeanStep(model)
    with pytest.warns(UserWarning, match="lean decoding step differs from the model's forward"):
        step(tokens(2), fast)
    fast.truncate(4)
    for _ in range(3):
        chosen = tokens(2)
        with torch.inference_mode():
            out = model(chosen[:, None], cache=slow, use_cache=True)
        assert torch.equal(step(chosen, fast), out["logits"][:, -1])


def test_why_not() -> None:
    model = tiny_model(torch.float32)
    assert why_not_lean(model) is None
    assert "training" in str(why_not_lean(model.train()))
    model.eval()
    with torch.autocast("cpu"):
        assert "autocast" in str(why_not_lean(model))
    hook = model.h["0"].register_forward_hook(lambda *args: None)
    assert "h.0 has hooks" in str(why_not_lean(model))
    hook.remove()
    model.h["2"].mlp.forward = lambda x: x
    assert "h.2.mlp has a forward of its own" in str(why_not_lean(model))
    del model.h["2"].mlp.forward
    own = type("MyAttention", (Attention,), {})
    model.h["1"].attn.__class__ = own
    assert "h.1.attn is a MyAttention" in str(why_not_lean(model))
    model.h["1"].attn.__class__ = Attention
    model.h["1"].compile()
    assert "h.1 has hooks or is compiled" in str(why_not_lean(model))

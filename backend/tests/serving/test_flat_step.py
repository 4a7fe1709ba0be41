"""没有填充的一步 == 不用缓存 == 今天填充的前向；抄前缀、回滚、清空、坏掉的槽。"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from app.models.transformer import GPT2Model
from app.models.transformer.backends import attend
from app.models.transformer.cache.row_cache import RowCache, RowStep, Span
from app.models.transformer.cache.store import Scatter
from app.native.build import load_native
from app.serving.flat_step import FlatStep
from tests.models.helpers import VARIANTS, tiny_model, tokens

ROWS, CONTEXT = 4, 24
EXACT = 1e-12


def make(model: GPT2Model, **options: Any) -> FlatStep:
    dtype = model.embed.wte.weight.dtype
    cache = RowCache(model.config, ROWS, dtype=dtype, **options)
    for keys, values in cache.stores:
        for part in (*keys.parts, *values.parts):
            # 没有写过的槽里可以是任何数；读到了就会在结果里看见。
            part.fill_(float("nan") if part.is_floating_point() else 77)
    return FlatStep(model, cache)


def schedule(seed: int, most: int) -> list[dict[int, int]]:
    """随机的几步：{行: 词元数}，每行写满为止；有时各行步调一致地各走一个。"""
    rng, steps = random.Random(seed), []
    left = rng.choices(range(3, CONTEXT + 1), k=ROWS)
    while any(left):
        busy = [row for row in range(ROWS) if left[row]]
        if rng.random() < 0.5:
            plan = dict.fromkeys(busy, 1)
        else:
            chosen = rng.sample(busy, rng.randint(1, len(busy)))
            plan = {row: min(left[row], rng.randint(1, most)) for row in sorted(chosen)}
        for row, count in plan.items():
            left[row] -= count
        steps.append(plan)
    return steps


def run(flat: FlatStep, ids: Tensor, steps: Sequence[dict[int, int]]) -> list[Tensor]:
    """每行的全部 logits (n, V)。"""
    found: list[list[Tensor]] = [[] for _ in range(ROWS)]
    for plan in steps:
        spans = [Span(row, count) for row, count in plan.items()]
        flat_ids: list[int] = []
        for span in spans:
            at = flat.cache.lengths[span.row]
            flat_ids += ids[span.row, at : at + span.count].tolist()
        logits = flat(flat_ids, spans, list(range(len(flat_ids))))
        assert logits is not None
        for span, part in zip(spans, logits.split([s.count for s in spans]), strict=True):
            found[span.row].append(part)
    return [torch.cat(rows) for rows in found]


@torch.inference_mode()
def differs(model: GPT2Model, seed: int = 0, **options: Any) -> float:
    """各行的 logits 与不用缓存的前向之差。"""
    ids = tokens(ROWS, CONTEXT, vocab=model.config.vocab_size)
    most = options.get("max_chunk", 9) if options.get("ring") else 9
    found = run(make(model, **options), ids, schedule(seed, most))
    return max(
        float((rows - model(ids[i : i + 1, : len(rows)])["logits"][0]).abs().max())
        for i, rows in enumerate(found)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_flat_step_is_the_forward(name: str) -> None:
    assert differs(tiny_model(**VARIANTS[name])) <= EXACT


@pytest.mark.parametrize("pattern", ["local(3)", "sinks(2, 3)", "local(3) | global(2)"])
def test_with_rings(pattern: str) -> None:
    model = tiny_model(attention_pattern=pattern, position="rope")
    assert differs(model, ring=True, max_chunk=5) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_two_hundred_schedules(seed: int) -> None:
    name = list(VARIANTS)[seed % len(VARIANTS)]
    assert differs(tiny_model(**VARIANTS[name]), seed) <= EXACT


@torch.inference_mode()
def test_the_padded_twin_says_the_same() -> None:
    """同样的几步交给 KVCache 与左填充的前向。"""
    model = tiny_model(position="rope", n_kv_head=2)
    ids = tokens(ROWS, CONTEXT)
    flat, cache = make(model), model.new_cache(ROWS)
    for plan in schedule(3, 6):
        spans = [Span(row, count) for row, count in plan.items()]
        width = max(plan.values())
        padded, mask = torch.zeros(ROWS, width).long(), torch.zeros(ROWS, width).long()
        rows = []
        for span in spans:
            at = flat.cache.lengths[span.row]
            rows += (part := ids[span.row, at : at + span.count]).tolist()
            padded[span.row, width - span.count :] = part
            mask[span.row, width - span.count :] = 1
        twin = model(padded, attention_mask=mask, cache=cache, use_cache=True)["logits"]
        found = flat(rows, spans, list(range(len(rows))))
        assert found is not None
        torch.testing.assert_close(found, twin[mask.bool()], rtol=0, atol=EXACT)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@torch.inference_mode()
def test_a_copied_prefix_is_the_prefix(kv_dtype: Any) -> None:
    model = tiny_model()
    ids = tokens(1, CONTEXT)[0].tolist()
    flat = make(model, kv_dtype=kv_dtype)
    cold = flat(ids, [Span(0, CONTEXT)], [CONTEXT - 1])
    for n in (1, 7, CONTEXT - 1):
        flat.cache.copy_prefix(0, 2, n)
        for keys, values in flat.cache.stores:
            for part in (*keys.parts, *values.parts):
                assert torch.equal(part[0, :, :n], part[2, :, :n])
        hit = flat(ids[n:], [Span(2, CONTEXT - n)], [CONTEXT - n - 1])
        assert cold is not None and hit is not None
        assert float((hit - cold).abs().max()) <= EXACT


@pytest.mark.parametrize("ring", [False, True])
@torch.inference_mode()
def test_rolled_back_rows_go_on_as_if_nothing_happened(ring: bool) -> None:
    model = tiny_model(attention_pattern="sinks(2, 4)", position="rope")
    ids, other = tokens(2, CONTEXT).tolist()
    flat = make(model, ring=ring, max_chunk=4)
    flat(ids[:4], [Span(1, 4)], [])
    for at in range(4, CONTEXT - 4):
        flat(other[at : at + 4], [Span(1, 4)], [])
        flat.cache.truncate(1, at)
        found = flat(ids[at : at + 1], [Span(1, 1)], [0])
        wanted = model(torch.tensor([ids[: at + 1]]))["logits"][0, -1:]
        assert found is not None and float((found - wanted).abs().max()) <= EXACT


def test_a_wrapped_ring_says_what_it_lost() -> None:
    model = tiny_model(attention_pattern="local(3)", position="rope")
    flat = make(model, ring=True, max_chunk=4)
    with torch.inference_mode():
        for _ in range(5):
            flat([1, 2, 3, 4], [Span(0, 4)], [])
    assert not flat.cache.keeps(0, 9) and flat.cache.keeps(0, 16)
    with pytest.raises(ValueError, match="row 0 cannot go back to 9 tokens"):
        flat.cache.truncate(0, 9)
    with pytest.raises(ValueError, match="cannot lend its first 9"):
        flat.cache.copy_prefix(0, 1, 9)
    with pytest.raises(ValueError, match="max_chunk=4"):
        flat.cache.begin([Span(1, 5)])


@pytest.mark.parametrize("spans", [[], [Span(4, 1)], [Span(0, 0)], [Span(0, 25)], [Span(0, 1)] * 2])
def test_wrong_spans_are_refused(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match=r"rows|tokens"):
        make(tiny_model()).cache.begin(spans)


@torch.inference_mode()
def test_a_forward_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    flat = make(model)
    ids = tokens(1, 8)[0].tolist()
    flat(ids[:5], [Span(0, 5)], [])
    with monkeypatch.context() as patch:
        patch.setattr(model, "head", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            flat(ids[5:], [Span(0, 3)], [2])
    assert flat.cache.lengths[0] == 5
    found = flat(ids[5:], [Span(0, 3)], [2])
    wanted = model(torch.tensor([ids]))["logits"][0, -1:]
    assert found is not None and float((found - wanted).abs().max()) <= EXACT


def _wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RowCache._apart

    def late(self: RowCache, layout: Any, spans: Any, low: int) -> Any:
        for sight in real(self, layout, spans, low):
            yield type(sight)(
                sight.tokens, sight.rows, sight.keys - (sight.keys > 1 and sight.q.length == 1),
                sight.q, sight.k,
            )  # fmt: skip

    monkeypatch.setattr(RowCache, "_apart", late)


def _wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RowCache.begin

    def begin(self: RowCache, spans: Any, padded: bool = False) -> RowStep:
        step = real(self, spans, padded)
        for where in step.slots.values():
            if isinstance(where, Scatter):
                where.rows.copy_((where.rows + 1) % ROWS)
        return step

    monkeypatch.setattr(RowCache, "begin", begin)


def _swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attend.attend_parts
    monkeypatch.setitem(
        attend._BACKENDS, "parts", lambda q, k, v, plan, dropout: real(q, v, k, plan, dropout)
    )


def _first_row_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RowCache.begin

    def begin(self: RowCache, spans: Any, padded: bool = False) -> RowStep:
        step = real(self, spans, padded)
        step.where.pos.copy_(step.where.pos - self.lengths[spans[0].row] * 0 - step.where.pos[0])
        return step

    monkeypatch.setattr(RowCache, "begin", begin)


@pytest.mark.parametrize("mutant", [_wrong_mask, _wrong_row, _swapped, _first_row_everywhere])
def test_planted_mistakes_are_seen(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert differs(model) <= EXACT
    mutant(monkeypatch)
    assert not differs(model) <= 1e-6


needs_native = pytest.mark.skipif(load_native().handle is None, reason=load_native().reason)
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "modern": {"position": "rope", "qk_norm": True, "activation": "swiglu", "n_kv_head": 2},
}


def narrow(kind: str) -> GPT2Model:
    return tiny_model(torch.float32, norm="pre", context_size=CONTEXT, **KINDS[kind])


def warmed(model: GPT2Model) -> FlatStep:
    """头一步已比过：此后都是原生的。"""
    flat = make(model)
    flat([1], [Span(0, 1)], [0])
    flat.cache.reset(0)
    assert flat._native is not None and flat._native_checked
    return flat


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
@torch.inference_mode()
def test_the_native_step_follows_the_operators(kind: str, seed: int) -> None:
    """各行长短不一，一步里一行走几个词元：差舍入。"""
    model = narrow(kind)
    ids, steps = tokens(ROWS, CONTEXT), schedule(seed, 6)
    native, slow = warmed(model), make(model)
    slow._native = None
    for got, want in zip(run(native, ids, steps), run(slow, ids, steps), strict=True):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
@torch.inference_mode()
def test_natively_a_text_has_the_same_bits_whatever_is_fed_beside_it(kind: str, seed: int) -> None:
    """一行一次喂几个、与谁同一步、借没借前缀：logits 逐位相同。"""
    model = narrow(kind)
    ids, steps = tokens(ROWS, CONTEXT), schedule(seed, 6)
    flat = warmed(model)
    together = run(flat, ids, steps)
    for row, found in enumerate(together):
        alone = warmed(model)
        each = [alone([i], [Span(2, 1)], [0]) for i in ids[row, : len(found)].tolist()]
        assert torch.equal(found, torch.cat([one for one in each if one is not None]))
    source, n = max((len(found), row) for row, found in enumerate(together))[1], 2
    target = (source + 1) % ROWS
    flat.cache.copy_prefix(source, target, n)
    rest = ids[source, n : len(together[source])].tolist()
    borrowed = flat(rest, [Span(target, len(rest))], [0, len(rest) - 1])
    assert borrowed is not None
    assert torch.equal(borrowed, together[source][[n, -1]])


@needs_native
@torch.inference_mode()
def test_threads_see_the_keys_that_others_wrote() -> None:
    """一行的几个词元分给几个线程：后面的要看前面的键，所以写完要等齐。"""
    model = narrow("modern")
    ids, flat = tokens(1, CONTEXT)[0].tolist(), warmed(model)
    wanted = flat(ids, [Span(0, CONTEXT)], range(CONTEXT))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(200):
            for keys, values in flat.cache.stores:
                for part in (*keys.parts, *values.parts):
                    part.fill_(float("nan"))
            flat.cache.reset(0)
            found = flat(ids, [Span(0, CONTEXT)], range(CONTEXT))
            assert found is not None and wanted is not None and torch.equal(found, wanted)
    finally:
        torch.set_num_threads(before)


@needs_native
@torch.inference_mode()
def test_only_the_logits_that_are_wanted_are_made() -> None:
    flat = warmed(narrow("learned"))
    assert flat([1, 2, 3], [Span(0, 3)], []) is None
    assert flat.cache.lengths[0] == 3
    found = flat([4, 5, 6], [Span(0, 2), Span(1, 1)], [1, 2])
    assert found is not None and len(found) == 2

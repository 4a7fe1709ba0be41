"""缓存与不缓存逐位置相等：任意分块、任意一侧填充、打包、回滚、换行。"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.models.transformer import GPT2Model, KVCache
from app.models.transformer.config import RoPEConfig
from app.models.transformer.layers.rope import rerotate

from ..helpers import VARIANTS, relative, tiny_config, tiny_model, tokens

BOUNDED = [
    name
    for name, changes in VARIANTS.items()
    if any(p.reach is not None for p in tiny_config(**changes).patterns)
]

T = 20
chunkings = st.lists(st.integers(1, T - 1), unique=True, max_size=6).map(sorted)
# float64 的界把错误（1e-3 量级）与舍入（1e-15 量级）分开十来个数量级。
TIGHT = 1e-12


def pieces(cuts: list[int], length: int = T) -> list[slice]:
    edges = [0, *cuts, length]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


@torch.no_grad()
def cached_logits(
    model: GPT2Model,
    ids: Tensor,
    cuts: list[int],
    mask: Tensor | None = None,
    segment: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    cache = cache or model.new_cache(ids.shape[0])
    parts = [
        model(
            ids[:, part],
            attention_mask=None if mask is None else mask[:, part],
            segment_ids=None if segment is None else segment[:, part],
            cache=cache,
            use_cache=True,
        )["logits"]
        for part in pieces(cuts)
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15)
@given(cuts=chunkings, seed=st.integers(0, 999))
def test_cache_equals_no_cache(name: str, cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model, ids = tiny_model(**VARIANTS[name]), tokens(2, T)
    with torch.no_grad():
        assert relative(cached_logits(model, ids, cuts), model(ids)["logits"]) <= TIGHT


@given(cuts=chunkings, seed=st.integers(0, 999))
def test_cache_equals_no_cache_in_float32(cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model, ids = tiny_model(torch.float32), tokens(2, T)
    with torch.no_grad():
        assert relative(cached_logits(model, ids, cuts), model(ids)["logits"]) <= 1e-5


@given(cuts=chunkings, pads=st.lists(st.integers(0, T - 1), min_size=3, max_size=3), left=...)
def test_padded_rows_in_a_cache_equal_rows_alone(
    cuts: list[int], pads: list[int], left: bool
) -> None:
    model, ids = tiny_model(), tokens(3, T)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, slice(None, pad) if left else slice(T - pad, None)] = 0
    got = cached_logits(model, ids, cuts, mask)
    for row in range(3):
        real = mask[row] == 1
        with torch.no_grad():
            alone = model(ids[row : row + 1, real])["logits"][0]
        assert relative(got[row, real], alone) <= TIGHT
    assert got.isfinite().all()


@given(cuts=chunkings, borders=st.lists(st.integers(1, T - 1), max_size=4, unique=True))
def test_packed_documents_in_a_cache(cuts: list[int], borders: list[int]) -> None:
    model, ids = tiny_model(), tokens(2, T)
    segment = torch.zeros_like(ids)
    for border in borders:
        segment[:, border:] += 1
    with torch.no_grad():
        whole = model(ids, segment_ids=segment)["logits"]
    assert relative(cached_logits(model, ids, cuts, segment=segment), whole) <= TIGHT


def test_decoding_continues_the_last_packed_document() -> None:
    model, ids = tiny_model(), tokens(1, 10)
    segment = torch.tensor([[0] * 4 + [1] * 3])
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids[:, :7], segment_ids=segment, cache=cache, use_cache=True)
        got = model(ids[:, 7:], cache=cache, use_cache=True)["logits"]
        alone = model(ids[:, 4:])["logits"][:, 3:]
    assert relative(got, alone) <= TIGHT


def test_decoding_after_a_left_padded_prompt_needs_no_mask() -> None:
    model, ids = tiny_model(), tokens(2, 12)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :5] = 0
    cache = model.new_cache(2)
    with torch.no_grad():
        model(ids[:, :8], attention_mask=mask, cache=cache, use_cache=True)
        assert cache.lengths.tolist() == [8, 3]
        got = torch.cat(
            [model(ids[:, t : t + 1], cache=cache, use_cache=True)["logits"] for t in range(8, 12)],
            1,
        )
        assert relative(got[0], model(ids[:1])["logits"][0, 8:]) <= TIGHT
        assert relative(got[1], model(ids[1:, 5:])["logits"][0, 3:]) <= TIGHT


@given(keep=st.lists(st.integers(0, 12), min_size=2, max_size=2), ragged=...)
def test_truncate_then_continue(keep: list[int], ragged: bool) -> None:
    model, ids, other = tiny_model(), tokens(2, 12), tokens(2, 5)
    keep = keep if ragged else [keep[0]] * 2
    cache = model.new_cache(2)
    with torch.no_grad():
        model(ids, cache=cache, use_cache=True)
        cache.truncate(torch.tensor(keep) if ragged else keep[0])
        assert cache.lengths.tolist() == keep
        got = model(other, cache=cache, use_cache=True)["logits"]
        for row, n in enumerate(keep):
            whole = torch.cat([ids[row : row + 1, :n], other[row : row + 1]], 1)
            assert relative(got[row], model(whole)["logits"][0, n:]) <= TIGHT


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [[1, 0, 1, 1], [0], [1, 0]])
def test_reorder_gathers_rows(rows: list[int], padded: bool) -> None:
    model, ids, new = tiny_model(), tokens(2, 9), tokens(len(rows), 3)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    cache = model.new_cache(2)
    with torch.no_grad():
        model(ids, attention_mask=mask if padded else None, cache=cache, use_cache=True)
        cache.reorder(torch.tensor(rows))
        got = model(new, cache=cache, use_cache=True)["logits"]
        for i, row in enumerate(rows):
            past = ids[row : row + 1, mask[row] == 1]
            whole = model(torch.cat([past, new[i : i + 1]], 1))["logits"][0, past.shape[1] :]
            assert relative(got[i], whole) <= TIGHT


def test_a_failed_forward_leaves_the_cache_as_it_was() -> None:
    model, ids = tiny_model(), tokens(2, 10)
    cache = model.new_cache(2)
    mask = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad():
        model(ids[:, :4], cache=cache, use_cache=True)
        broken = model.h["2"].mlp.forward
        model.h["2"].mlp.forward = lambda x: 1 / 0
        for extra in ({}, {"attention_mask": mask}):
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 4:7], cache=cache, use_cache=True, **extra)
        model.h["2"].mlp.forward = broken
        assert cache.lengths.tolist() == [4, 4]
        got = model(ids[:, 4:], cache=cache, use_cache=True)["logits"]
        assert relative(got, model(ids)["logits"][:, 4:]) <= TIGHT


def test_garbage_in_fresh_memory_never_reaches_the_output() -> None:
    model, ids = tiny_model(), tokens(2, 8)
    mask = torch.tensor([[1] * 8, [0] * 6 + [1] * 2])
    cache = model.new_cache(2)
    for layer in (*cache.keys, *cache.values):
        layer.fill_(float("nan"))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, cache=cache, use_cache=True)["logits"]
        after = model(ids[:, :2], cache=cache, use_cache=True)["logits"]
    assert logits.isfinite().all() and after.isfinite().all()


def test_cache_holds_exactly_max_len() -> None:
    model, ids = tiny_model(), tokens(1, 7)
    cache = model.new_cache(1, max_len=6)
    with torch.no_grad():
        model(ids[:, :6], cache=cache, use_cache=True)
        with pytest.raises(ValueError, match="max_len=6 tokens per row but 7"):
            model(ids[:, 6:], cache=cache, use_cache=True)


def test_padding_takes_no_room() -> None:
    model, ids = tiny_model(), tokens(2, 8)
    mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 3 + [0] * 5])
    cache = model.new_cache(2, max_len=4)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache, use_cache=True)
    assert cache.lengths.tolist() == [4, 3]


def test_cached_keys_carry_no_graph() -> None:
    model, ids = tiny_model(), tokens(1, 6)
    cache = model.new_cache(1)
    model(ids, cache=cache, use_cache=True)
    assert not any(k.requires_grad for k in (*cache.keys, *cache.values))


def test_bad_calls_are_named() -> None:
    model, config = tiny_model(), tiny_config()
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(2, 3), cache=cache)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(2, 3), return_cache=True)
    with pytest.raises(ValueError, match="2 rows but input_ids has 3"):
        model(tokens(3, 3), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="cut gradients"):
        model(tokens(2, 3), targets=tokens(2, 3), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="beyond context_size=24"):
        KVCache.for_model(config, 1, 25)
    with pytest.raises(ValueError, match="batch_size=0"):
        KVCache.for_model(config, 0)
    with pytest.raises(ValueError, match="outside batch_size=2"):
        cache.reorder(torch.tensor([2]))
    with pytest.raises(ValueError, match="dtype"), torch.no_grad():
        model(tokens(2, 3), cache=KVCache.for_model(config, 2), use_cache=True)
    other = KVCache.for_model(config.replace(n_layer=2), 2)
    with pytest.raises(ValueError, match="n_layer=3"):
        model(tokens(2, 3), cache=other, use_cache=True)


def test_explicit_positions_stay_inside_the_last_packed_document() -> None:
    model, ids = tiny_model(), tokens(1, 8)
    segment = torch.tensor([[0] * 4 + [1] * 3])
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids[:, :7], segment_ids=segment, cache=cache, use_cache=True)
        three = torch.tensor([[3]])
        got = model(ids[:, 7:], positions=three, cache=cache, use_cache=True)["logits"]
        alone = model(ids[:, 4:])["logits"][:, 3:]
    assert relative(got, alone) <= TIGHT


def test_what_truncation_dropped_stays_invisible_to_new_documents() -> None:
    """被丢下的槽里还有旧文档的小位置：长度之后的槽必须当作空，因果性挡不住它们。"""
    model, ids, new = tiny_model(), tokens(2, 8), tokens(2, 2)
    segment = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]] * 2)
    cache = model.new_cache(2)
    with torch.no_grad():
        model(ids, segment_ids=segment, cache=cache, use_cache=True)
        cache.truncate(torch.tensor([3, 8]))
        two = torch.full_like(new, 2)
        got = model(new, segment_ids=two, cache=cache, use_cache=True)["logits"]
        assert relative(got[0], model(new[:1])["logits"][0]) <= TIGHT


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=25)
@given(cuts=chunkings, max_chunk=st.integers(1, 4), padded=..., seed=st.integers(0, 999))
def test_a_ring_in_the_model_equals_no_cache(
    name: str, cuts: list[int], max_chunk: int, padded: bool, seed: int
) -> None:
    """默认的 max_chunk 比这里的上下文还长，环便不值得；小的才真的绕回。"""
    torch.manual_seed(seed)
    model, ids = tiny_model(**VARIANTS[name]), tokens(2, T)
    cache = model.new_cache(2, max_chunk=max_chunk)
    assert any(keys.shape[2] <= T for keys in cache.keys)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, : seed % T] = 0
    got = cached_logits(model, ids, cuts, mask if padded else None, cache=cache)
    for row in range(2):
        real = mask[row] == 1
        with torch.no_grad():
            alone = model(ids[row : row + 1, real])["logits"][0]
        assert relative(got[row, real], alone) <= TIGHT


def test_windows_and_rope_decode_past_every_limit() -> None:
    """每层都是环、位置不是学得的：没有上限，占的字节也不变。"""
    model = tiny_model(position="rope", attention_pattern="sinks(2, 5)", n_layer=2)
    ids, cache, sizes = tokens(1, 100), model.new_cache(1, max_chunk=3), set()
    got = []
    with torch.no_grad():
        for t in range(100):
            got.append(model(ids[:, t : t + 1], cache=cache, use_cache=True)["logits"])
            sizes.add(cache.nbytes)
        assert relative(torch.cat(got, 1), model(ids)["logits"]) <= TIGHT
    assert cache.max_len is None and len(sizes) == 1


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", ["causal", "sinks(2, 6)"])
def test_streaming_evicts_the_middle(layout: str, padded: bool, pattern: str) -> None:
    """一层的键只来自自己的词元：丢掉中段之后，与从来没有中段的一段文字逐位置相同。"""
    model = tiny_model(
        n_layer=1, position="rope", rope=RoPEConfig(layout=layout), attention_pattern=pattern
    )
    config, ids, new = model.config, tokens(2, 20), tokens(2, 3)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    cache = model.new_cache(2, max_chunk=2)
    turn = partial(rerotate, rope=config.rope, context_size=config.context_size)
    with torch.no_grad():
        model(ids, attention_mask=mask if padded else None, cache=cache, use_cache=True)
        cache.evict(2, 7, turn)
        assert cache.lengths.tolist() == [9, 9]
        got = model(new, cache=cache, use_cache=True)["logits"]
        for row in range(2):
            real = ids[row, mask[row] == 1]
            kept = torch.cat([real[:2], real[-7:], new[row]])[None]
            assert relative(got[row], model(kept)["logits"][0, 9:]) <= TIGHT

"""键值的存储：int8 的误差界、字节数、搬动；浮点存储读的是视图。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.models.transformer import KVCache
from app.models.transformer.cache.store import Int8Store, Runs, Scatter, Store

from ..helpers import relative, tiny_config, tiny_model, tokens

ALL = Runs(((slice(0, 6), None),))


def allocate(kind: type[Store], dtype: torch.dtype = torch.float32) -> Store:
    store = kind.allocate((2, 3, 7, 8), dtype, "cpu")
    for part in store.parts:
        part.zero_()
    return store


@given(
    scale=st.floats(-30, 30).map(lambda x: 10.0**x),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_int8_error_is_at_most_half_the_scale(scale: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    store, x = allocate(Int8Store, dtype), torch.randn(2, 3, 6, 8, dtype=dtype) * scale
    x[0, 0, 0] *= 1000  # 一个离群的词元，不应损及别的。
    store.write(ALL, x)
    got = store.read(slice(6))
    assert got.dtype == dtype
    step = x.abs().amax(-1, keepdim=True) / 127
    # 1e-5：尺度与商都是 float32。
    assert ((got - x).abs() <= step * (0.5 + 1e-5)).all()
    assert ((got - x).abs().amax(-1, keepdim=True) > step * 0.05).any()


def test_int8_of_zeros_is_zero_and_nan_stays_visible() -> None:
    store, x = allocate(Int8Store), torch.zeros(2, 3, 6, 8)
    x[0, 0, 1, 2] = float("nan")
    store.write(ALL, x)
    got = store.read(slice(6))
    assert got[0, 0, 1].isnan().all()
    assert (got[0, 0, 0] == 0).all() and (got[1] == 0).all()


@pytest.mark.parametrize("kind", [Store, Int8Store])
def test_writing_reading_moving(kind: type[Store]) -> None:
    x = torch.randn(2, 3, 4, 8)
    whole, pieces = allocate(kind), allocate(kind)
    whole.write(Runs(((slice(1, 5), None),)), x)
    pieces.write(Runs(((slice(3, 5), slice(2, 4)), (slice(1, 3), slice(0, 2)))), x)
    assert torch.equal(whole.read(slice(5)), pieces.read(slice(5)))

    scattered = allocate(kind)
    slots = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    scattered.write(Scatter(torch.arange(2)[:, None], slots), x)
    assert torch.equal(scattered.read(slice(5))[0], whole.read(slice(5))[0])
    assert torch.equal(scattered.read(slice(1, 5))[1], whole.read(slice(1, 5))[1].flip(1))

    before = whole.read(slice(6)).clone()
    other = whole.clone()
    other.move(torch.tensor([[4, 1]]), slice(0, 2))
    assert torch.equal(other.read(slice(2)), before[:, :, [4, 1]])
    assert torch.equal(whole.read(slice(6)), before)
    other.clear(0, 2)
    assert (other.read(slice(2)) == 0).all()

    swapped = whole.rows(torch.tensor([1, 0, 1]), 5)
    assert torch.equal(swapped.read(slice(5)), before[[1, 0, 1], :, :5])


def test_int8_moves_without_rounding_again() -> None:
    store, x = allocate(Int8Store), torch.randn(2, 3, 6, 8)
    store.write(ALL, x)
    first = store.read(slice(6)).clone()
    for _ in range(20):
        store.move(torch.tensor([[5, 0, 1, 2, 3, 4]]), slice(0, 6))
    store.move(torch.tensor([[2, 3, 4, 5, 0, 1]]), slice(0, 6))
    assert torch.equal(store.read(slice(6)), first)


def test_a_float_store_reads_views() -> None:
    store = allocate(Store)
    assert store.read(slice(3)).data_ptr() == store.parts[0].data_ptr()


def test_int8_takes_a_quarter() -> None:
    """宽 64 的头：256 字节对 64 + 4。"""
    config = tiny_config(n_embed=256, n_head=4, context_size=256)
    sizes = [KVCache.for_model(config, 2, kv_dtype=q).nbytes for q in (None, "int8")]
    assert sizes[0] / sizes[1] == pytest.approx(256 / 68)
    layers, rows, slots = config.n_layer, 2, 257
    assert sizes[0] == 2 * layers * rows * config.kv_heads * slots * 64 * 4


@pytest.mark.parametrize("patterns", [None, ("sinks(2, 5)", "causal", "local(3)")])
def test_int8_decoding_stays_close(patterns: tuple[str, ...] | None) -> None:
    model, ids = tiny_model(torch.float32, attention_pattern=patterns), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for padding in (None, mask):
        got, exact = [], []
        for out, kv_dtype in ((got, "int8"), (exact, None)):
            cache = model.new_cache(2, max_chunk=2, kv_dtype=kv_dtype)
            for part in (slice(0, 9), slice(9, 11), *(slice(t, t + 1) for t in range(11, 20))):
                piece = None if padding is None else padding[:, part]
                with torch.no_grad():
                    step = model(ids[:, part], attention_mask=piece, cache=cache, use_cache=True)
                out.append(step["logits"])
        assert torch.equal(got[0], exact[0])  # 空缓存的第一块看的是没有量化的键值。
        error = relative(torch.cat(got[1:], 1), torch.cat(exact[1:], 1))
        assert 0 < error < 0.1


def test_the_old_name_of_kv_dtype_works_with_a_note() -> None:
    model = tiny_model(torch.float32)
    with pytest.warns(FutureWarning, match="is now called kv_dtype='int8'"):
        old = model.new_cache(1, quantize="int8")
    assert old.nbytes == model.new_cache(1, kv_dtype="int8").nbytes < model.new_cache(1).nbytes
    with pytest.raises(ValueError, match="kv_dtype=None and its old name quantize='int8'"):
        model.new_cache(1, quantize="int8", kv_dtype=None)

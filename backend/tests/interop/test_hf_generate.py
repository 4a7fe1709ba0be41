"""generate 的各种写法：与主干自己的解码、与不用缓存、彼此相同。float64，所以词元逐个相等。"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from app.generation.config import SamplingConfig
from app.interop.transformers import WorkbenchCache, WorkbenchForCausalLM, wrap
from app.models.transformer import GPT2Model
from tests.generation.helpers import new_tokens

from .variants import VARIANTS, model, tokens

NEW = 12


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[GPT2Model, WorkbenchForCausalLM]:
    core = model(request.param)
    return core, wrap(core, pad_token_id=0)


def prompts() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """左侧填充的 (ids, mask)，以及各行单独的词元。"""
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return (
        ids.masked_fill(mask == 0, 0),
        mask,
        [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)],
    )


def greedy(core: GPT2Model, rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(
        new_tokens(core, rows, max_new_tokens=NEW, sampling=SamplingConfig(temperature=0))
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["dynamic", "static", "ours", "ours chunk 1", "none"])
def test_greedy_equals_the_backbones_decoder(pair: Any, way: str, implementation: str) -> None:
    core, wrapped = pair
    wrapped.set_attn_implementation(implementation)
    ids, mask, rows = prompts()
    options: dict[str, Any] = {
        "dynamic": {"past_key_values": DynamicCache(config=wrapped.config)},
        "static": {"past_key_values": StaticCache(config=wrapped.config, max_cache_len=9 + NEW)},
        "ours": {"past_key_values": WorkbenchCache()},
        "ours chunk 1": {"past_key_values": WorkbenchCache(max_chunk=1), "prefill_chunk_size": 1},
        "none": {"use_cache": False},
    }[way]
    out = wrapped.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(out[:, 9:], greedy(core, rows))


def test_greedy_texts_differ_so_that_equality_means_something() -> None:
    texts = {tuple(greedy(model(name), prompts()[2]).flatten().tolist()) for name in VARIANTS}
    assert len(texts) == len(VARIANTS)
    assert sum(len(set(text)) for text in texts) > 8 * len(texts)


def test_an_int8_cache_generates(pair: Any) -> None:
    core, wrapped = pair
    ids, mask, _ = prompts()
    cache = WorkbenchCache(kv_dtype="int8")
    out = wrapped.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, past_key_values=cache
    )
    assert out.shape == (3, 13) and cache.kv is not None and cache.kv.keys[0].dtype == torch.int8


def test_sampling_draws_the_same_through_every_cache(pair: Any) -> None:
    _, wrapped = pair
    ids, mask, _ = prompts()

    def drawn(**options: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return wrapped.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, temperature=0.9,
            top_k=20, top_p=0.95, num_return_sequences=2, **options,
        )  # fmt: skip

    plain = drawn(use_cache=False)
    assert len({tuple(row.tolist()) for row in plain}) > 3
    assert torch.equal(drawn(), plain)
    assert torch.equal(drawn(past_key_values=WorkbenchCache()), plain)


def test_beams_are_the_same_through_every_cache(pair: Any) -> None:
    _, wrapped = pair
    ids, mask, _ = prompts()

    def searched(**options: Any) -> torch.Tensor:
        return wrapped.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, num_beams=3, num_return_sequences=2,
            eos_token_id=7, do_sample=False, length_penalty=0.7, **options,
        )  # fmt: skip

    plain = searched(use_cache=False)
    assert torch.equal(searched(), plain)
    assert torch.equal(searched(past_key_values=WorkbenchCache()), plain)
    assert torch.equal(searched(cache_implementation="static"), plain)


@pytest.mark.parametrize("ours", [False, True])
def test_assisted_and_prompt_lookup_equal_greedy(pair: Any, ours: bool) -> None:
    core, wrapped = pair
    ids = tokens(1, 9, seed=3)
    expected = greedy(core, ids.tolist())
    assistant = wrap(model("post", n_layer=1), pad_token_id=0)
    for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        past = {"past_key_values": WorkbenchCache()} if ours else {}
        out = wrapped.generate(ids, max_new_tokens=NEW, do_sample=False, **helper, **past)
        assert torch.equal(out[:, 9:], expected)
    # 自己当自己的助手：提议全被接受，回滚也常常发生在最后一步。
    out = wrapped.generate(ids, max_new_tokens=NEW, do_sample=False, assistant_model=wrap(core))
    assert torch.equal(out[:, 9:], expected)


def test_generation_goes_on_from_a_returned_cache(pair: Any) -> None:
    core, wrapped = pair
    ids = tokens(2, 9)
    for past in (DynamicCache(config=wrapped.config), WorkbenchCache()):
        first = wrapped.generate(
            ids, max_new_tokens=5, do_sample=False, past_key_values=past,
            return_dict_in_generate=True,
        )  # fmt: skip
        rest = wrapped.generate(
            first.sequences, max_new_tokens=NEW - 5, do_sample=False,
            past_key_values=first.past_key_values,
        )  # fmt: skip
        assert torch.equal(rest[:, 9:], greedy(core, ids.tolist()))


def test_generation_from_embeddings(pair: Any) -> None:
    core, wrapped = pair
    ids = tokens(2, 9)
    out = wrapped.generate(
        inputs_embeds=wrapped.get_input_embeddings()(ids), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(out, greedy(core, ids.tolist()))


def test_outputs_of_generation_have_their_shapes(pair: Any) -> None:
    _, wrapped = pair
    wrapped.set_attn_implementation("eager")
    ids = tokens(2, 9)
    out = wrapped.generate(
        ids, max_new_tokens=3, do_sample=False, output_attentions=True, output_hidden_states=True,
        output_logits=True, return_dict_in_generate=True, use_cache=False,
    )  # fmt: skip
    assert [len(step) for step in out.attentions] == [2, 2, 2]
    assert out.attentions[2][1].shape == (2, 4, 11, 11)
    assert [step[-1].shape for step in out.hidden_states] == [(2, 9 + i, 32) for i in range(3)]
    assert torch.equal(out.logits[-1].argmax(-1), out.sequences[:, -1])


def test_stop_tokens_end_a_row_and_pad_the_rest() -> None:
    core = model("pre")
    wrapped = wrap(core, pad_token_id=0)
    ids, mask, rows = prompts()
    plain = greedy(core, rows)
    stop = int(plain[0, 4])
    for past in (DynamicCache(config=wrapped.config), WorkbenchCache()):
        out = wrapped.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=stop,
            past_key_values=past,
        )[:, 9:]  # fmt: skip
        for got, expected in zip(out, plain, strict=True):
            where = (expected == stop).nonzero()
            end = int(where[0]) + 1 if len(where) else NEW
            assert torch.equal(got[:end], expected[:end])
            assert bool((got[end:] == 0).all())


def test_our_cache_refuses_what_it_cannot_do() -> None:
    wrapped = wrap(model("pre"))
    cache = WorkbenchCache()
    with pytest.raises(ValueError, match="2D attention_mask"):
        wrapped(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="use DynamicCache with other models"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="as a negative"):
        cache.crop(3)
    wrapped(tokens(2, 4), past_key_values=WorkbenchCache(), use_cache=True)
    with torch.no_grad():
        wrapped(tokens(2, 4), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="the cache has 2 rows but the input has 3"):
        wrapped(tokens(3, 4), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="max_len=48 tokens per row but 49"):
        wrapped.generate(tokens(2, 4), past_key_values=cache, max_new_tokens=60)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_a_ring_keeps_only_what_can_be_seen() -> None:
    wrapped = wrap(model("prefix and window"))
    cache = WorkbenchCache(max_chunk=4)
    wrapped.generate(tokens(1, 9), max_new_tokens=30, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 38
    # local(5) | global(3)：3 + 5 + 4 - 1 个槽，外加填充的去处。
    assert cache.kv is not None and cache.kv.keys[0].shape[2] == 12

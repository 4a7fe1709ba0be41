"""不分配就算出来的大小，与真的分配之后量到的相同。"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.models.transformer import GPT2Config, KVCache
from app.planning.sizes import PARTS, active_parameters, cache_sizes, parameters_by_part
from tests.models.helpers import VARIANTS, tiny_config, tiny_model


@pytest.mark.parametrize("name", VARIANTS)
def test_the_parts_add_up_to_the_model(name: str) -> None:
    model = tiny_model(torch.float32, **VARIANTS[name])
    parts = parameters_by_part(model.config)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == model.num_parameters()
    assert parts["attention"] == sum(
        p.numel() for n, p in model.named_parameters() if ".attn.c_" in n
    )
    feeds = {n: p.numel() for n, p in model.named_parameters() if ".mlp." in n}
    assert parts["mlp"] + parts["router"] + parts["experts"] == sum(feeds.values())
    for part in ("router", "experts"):
        assert parts[part] == sum(n for name, n in feeds.items() if f".{part}." in name)
    assert active_parameters(model.config) == model.active_parameters()
    assert parts["norms"] == sum(
        p.numel() for n, p in model.named_parameters() if "ln_" in n or "_norm" in n
    )
    assert parts["embedding"] == sum(p.numel() for p in model.embed.parameters())


def test_gpt2_small() -> None:
    parts = parameters_by_part(GPT2Config(vocab_size=50257, norm="pre"))
    assert sum(parts.values()) == 124_439_808
    assert parts["embedding"] == (50257 + 1024) * 768 and parts["head"] == 0
    untied = parameters_by_part(GPT2Config(vocab_size=50257, tie_weights=False))
    assert untied["head"] == 50257 * 768


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_pattern": ("sinks(2, 5)", "causal"), "position": "rope", "n_kv_head": 2}],
)
def test_cache_sizes_are_those_of_an_allocated_cache(
    changes: dict[str, Any], kv_dtype: Any
) -> None:
    config = tiny_config(**changes)
    length = 24 if config.position == "learned" else 200
    sizes = cache_sizes(config, length, kv_dtype)
    cache = KVCache.for_model(config, 1, length, kv_dtype=kv_dtype)
    assert len(sizes) == config.n_layer
    assert sum(size.nbytes for size in sizes) == cache.nbytes
    if changes:
        assert [size.slots for size in sizes] == [2 + 5 + 31, 200, 2 + 5 + 31]
        assert sizes[0].nbytes < sizes[1].nbytes


def test_a_long_cache_costs_nothing_to_size_and_a_window_stays_small() -> None:
    config = tiny_config(position="rope", attention_pattern="local(8)")
    assert cache_sizes(config, 1 << 40) == cache_sizes(config, 1000)
    whole = tiny_config(position="rope")
    assert cache_sizes(whole, 1 << 40)[0].slots == 1 << 40


def test_learned_positions_end() -> None:
    with pytest.raises(ValueError, match="max_len=25 is beyond context_size=24"):
        cache_sizes(tiny_config(), 25)

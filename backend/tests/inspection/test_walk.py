"""逐子层走一遍与模型的前向逐位相同；注意力图等于十行的 float64 参考；各分支的份额说得对。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from app.inspection.attention import as_arrays, as_bytes
from app.inspection.look import norms
from app.inspection.patterns import hidden, words
from app.inspection.slices import whole
from app.inspection.walk import final, walk
from app.models.transformer import GPT2Model
from app.models.transformer.visibility.pattern_text import parse
from tests.models.helpers import VARIANTS, tiny_model

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def model_of(**changes: Any) -> GPT2Model:
    torch.manual_seed(5)
    return tiny_model(torch.float64, **changes).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_walk_is_the_forward(name: str) -> None:
    """残差流、注意力图与路由，逐位；每种归一化、位置、图样、专家。"""
    model = model_of(**VARIANTS[name])
    config = model.config
    layers, moe = range(config.n_layer), config.moe_layers
    found = whole(walk(model, IDS, maps=layers, routing=moe))
    with torch.no_grad():
        wanted = model(
            torch.tensor([IDS]), return_attention=tuple(layers), return_routing=moe,
            return_hidden=tuple(range(config.n_layer + 1)),
        )  # fmt: skip
    for i, stream in enumerate(found.streams):
        assert torch.equal(stream, wanted["hidden"][i][0]), i
    for layer in layers:
        assert torch.equal(found.maps[layer], wanted["attentions"][layer][0]), layer
    for layer in moe:
        for mine, theirs in zip(found.routing[layer], wanted["routing"][layer], strict=True):
            assert torch.equal(mine, theirs[0]), layer
    with torch.inference_mode():
        last = final(model, found.streams[-1], config.vocab_size)
    torch.testing.assert_close(last, wanted["logits"][0], rtol=0, atol=1e-12)


def reference(model: GPT2Model, stream: np.ndarray, layer: int) -> np.ndarray:
    """(T, C) -> (H, T, T)：照公式写的，只用 numpy。"""
    config, block = model.config, model.h[str(layer)]
    weight, bias = (p.detach().numpy() for p in (block.attn.c_attn.weight, block.attn.c_attn.bias))
    gain, shift = (p.detach().numpy() for p in (block.ln_1.weight, block.ln_1.bias))
    x = stream
    if config.norm in ("pre", "keel"):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * gain + shift
    n, d, heads, groups = len(x), config.head_dim, config.n_head, config.kv_heads
    fused = (x @ weight.T + bias).reshape(n, -1, d).transpose(1, 0, 2)
    q, k = fused[:heads], np.repeat(fused[heads : heads + groups], heads // groups, axis=0)
    if config.position == "rope":
        angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
        turn = np.exp(1j * angle)
        q, k = (
            np.concatenate([z.real, z.imag], -1)
            for z in ((y[..., : d // 2] + 1j * y[..., d // 2 :]) * turn for y in (q, k))
        )
    scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(d))
    scores *= SEES[config.attention_pattern](np.arange(n)[:, None], np.arange(n)[None])
    total: np.ndarray = scores / scores.sum(-1, keepdims=True)
    return total


SEES: dict[Any, Any] = {
    None: lambda q, k: k <= q,
    "local(4)": lambda q, k: (k <= q) & (q - k < 4),
    "sinks(2, 3)": lambda q, k: (k <= q) & ((k < 2) | (q - k < 3)),
    "local(3) | global(1)": lambda q, k: (k <= q) & ((k < 1) | (q - k < 3)),
    "longformer(3, 2)": lambda q, k: (k <= q) & ((k < 2) | (q - k < 3)),
    "strided(3)": lambda q, k: (k <= q) & ((q - k) % 3 == 0),
}
CASES: dict[str, dict[str, Any]] = {
    "causal": {"norm": "pre"},
    "post": {"norm": "post"},
    "window": {"norm": "pre", "attention_pattern": "local(4)"},
    "sinks": {"norm": "keel", "attention_pattern": "sinks(2, 3)"},
    "global": {"attention_pattern": "local(3) | global(1)"},
    "longformer": {"norm": "pre", "attention_pattern": "longformer(3, 2)"},
    "strided": {"norm": "pre", "attention_pattern": "strided(3)"},
    "grouped": {"norm": "pre", "n_kv_head": 2},
    "rope": {"norm": "pre", "position": "rope", "n_kv_head": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_reference(name: str) -> None:
    model = model_of(**CASES[name])
    layers = range(model.config.n_layer)
    found = whole(walk(model, IDS, maps=layers))
    cells = hidden(model.config.patterns, len(IDS))
    for layer, weights in as_arrays(found.maps).items():
        wanted = reference(model, found.streams[layer].numpy(), layer)
        np.testing.assert_allclose(weights, wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=1e-6)
        # 遮住的格子恰是零，看得见的都不是零。
        assert np.array_equal(weights == 0, np.broadcast_to(cells[layer], weights.shape))
        back = (as_bytes(weights) / 255.0) ** 2
        np.testing.assert_allclose(back.sum(-1), 1, rtol=0, atol=0.02)
        assert np.abs(np.sqrt(back) - np.sqrt(weights)).max() <= 0.5 / 255 + 1e-12


@pytest.mark.parametrize("name", [*CASES, "moe switch", "swiglu", "deepnorm", "keel"])
def test_the_shares_of_the_branches(name: str) -> None:
    """各分支加了多长；pre 的残差流恰是各份之和，别处不是，也就这样说。"""
    model = model_of(**(CASES | VARIANTS)[name])
    added: dict[str, list[torch.Tensor]] = {"attn": [], "mlp": []}
    for block in model.h.values():
        for part, kept in added.items():
            getattr(block, part).register_forward_hook(lambda m, i, out, k=kept: k.append(out[0]))
    found = whole(walk(model, IDS))
    lengths = norms(model, found)
    for part, mine in (("attn", lengths.attention), ("mlp", lengths.mlp)):
        wanted = np.stack([np.sqrt((x.numpy() ** 2).sum(-1)) for x in added[part]])
        np.testing.assert_allclose(mine, wanted, rtol=1e-12)
    wanted = np.stack([np.sqrt((x.numpy() ** 2).sum(-1)) for x in found.streams])
    np.testing.assert_allclose(lengths.stream, wanted, rtol=1e-12)
    off = max(
        float((found.streams[i + 1] - found.streams[i] - a - m).abs().max())
        for i, (a, m) in enumerate(zip(added["attn"], added["mlp"], strict=True))
    )
    assert lengths.additive is (model.config.norm == "pre")
    assert (off < 1e-12) is lengths.additive, off


@pytest.mark.parametrize("ids", [[], list(range(25))])
def test_too_few_or_many_tokens_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="give 1 to context_size=24"):
        whole(walk(model_of(), ids))


def test_a_model_in_training_and_a_layer_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="call model.eval"):
        whole(walk(model_of().train(), IDS))
    with pytest.raises(ValueError, match="layers here go from 0 to 2"):
        whole(walk(model_of(), IDS, maps=(3,)))
    with pytest.raises(ValueError, match="the MoE layers are"):
        whole(walk(model_of(), IDS, routing=(0,)))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("causal", "every earlier token and itself"),
        ("local(5)", "the last 5 tokens, itself included"),
        ("local(5, 2)", "the last 5 tokens, one in 2, itself included"),
        ("strided(3)", "every 3th token back"),
        ("fixed(5, 2)", "its own block of 5 tokens and the last 2 of every block"),
        ("longformer(3, 2, 2)", "or the first 2 tokens"),
        ("longformer(3, 0)", "the last 3 tokens, itself included"),
        ("sinks(2, 5)", "the first 2 tokens, or the last 5 tokens"),
        ("local(4) | global(2)", "the last 4 tokens, itself included, or the first 2 tokens"),
        ("local(4) & strided(2)", "but only every 2th"),
    ],
)
def test_patterns_have_words(pattern: str, said: str) -> None:
    assert said in words(parse(pattern))

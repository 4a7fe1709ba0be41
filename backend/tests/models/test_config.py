"""配置：往返、点名的错误、尚不存在的部件被拒绝、不导入 torch。"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.models.transformer import GPT2Config

from .helpers import VARIANTS, tiny_config


def test_defaults_are_the_contract() -> None:
    config = GPT2Config()
    assert (config.vocab_size, config.context_size) == (50304, 1024)
    assert (config.n_layer, config.n_head, config.n_embed) == (12, 12, 768)
    assert (config.dropout, config.bias, config.norm) == (0.1, True, "post")
    assert (config.use_sparse_attention, config.moe_num_experts, config.moe_top_k) == (False, 0, 2)
    assert (config.head_dim, config.kv_heads, config.mlp_hidden) == (64, 12, 3072)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str) -> None:
    config = tiny_config(**VARIANTS[name])
    assert GPT2Config.from_json(config.to_json()) == config
    assert hash(GPT2Config.from_dict(config.to_dict())) == hash(config)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"n_head": 7}, "n_embed=32 is not a multiple of n_head=7: use n_embed=35"),
        ({"n_head": 0}, "n_head=0 must be between 1 and"),
        ({"n_layer": -1}, "n_layer=-1 must be between 1 and"),
        ({"n_layer": 10**9}, "n_layer=1000000000 must be between"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"n_kv_head": 3}, "n_kv_head=3 must divide n_head=4"),
        ({"norm": "Post"}, "norm='Post' is not one of"),
        ({"n_layer": "3"}, "n_layer='3' has type str, expected int"),
        ({"n_layer": True}, "n_layer=True has type bool, expected int"),
        ({"bias": 1}, "bias=1 has type int, expected bool"),
        ({"position": "rope"}, "position='rope' is not available"),
        ({"attention_backend": "flex"}, "attention_backend='flex' is not available"),
        ({"use_sparse_attention": True}, "sparse attention is not available"),
        ({"attention_pattern": "local(4)"}, "sparse attention is not available"),
        ({"moe_num_experts": 8}, "moe_num_experts=8: mixture of experts is not available"),
        ({"moe_top_k": 0}, "moe_top_k=0"),
        ({"n_layr": 3}, "unknown model option 'n_layr': did you mean 'n_layer'"),
        ({"schema_version": 99}, "schema_version=99 but this version reads 1"),
    ],
)
def test_every_error_names_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict({**tiny_config().to_dict(), **changes})


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"n_layer": 1e400}'])
def test_junk_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        GPT2Config.from_json(text)


junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.none())
)


@given(st.dictionaries(st.sampled_from([*tiny_config().to_dict(), "x"]), junk, min_size=1))
def test_junk_values_are_refused_or_valid(data: dict[str, Any]) -> None:
    try:
        config = GPT2Config.from_dict(data)
    except ValueError:
        return
    assert GPT2Config.from_dict(config.to_dict()) == config


def test_the_config_needs_no_torch() -> None:
    code = (
        "import sys; from app.models.transformer import GPT2Config; GPT2Config();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

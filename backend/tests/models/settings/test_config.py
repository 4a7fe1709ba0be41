"""配置：往返、点名的错误、图样与旋转位置的矛盾、旧文件照读、不导入 torch。"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.models.transformer import GPT2Config
from app.models.transformer.config import RoPEConfig
from app.models.transformer.visibility.atoms import Global, Local
from app.models.transformer.visibility.pattern import CAUSAL

from ..helpers import VARIANTS, tiny_config


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
        ({"dropout": 10**400}, "dropout is an integer too large for a float"),
        ({"attention_pattern": "lokal(4)"}, "'lokal.4.': unknown pattern 'lokal': did you mean"),
        ({"attention_pattern": ["local(4)", "locl(4)"]}, "unknown pattern 'locl': did you mean"),
        ({"attention_pattern": "local(25)"}, "window=25 of .* more than context_size=24"),
        ({"attention_pattern": ["causal", "global(2) & local(3)"]}, "='global.*position 4 sees no"),
        ({"attention_pattern": []}, "empty cycle"),
        ({"attention_pattern": 4}, "attention pattern 4 is not text"),
        ({"attention_pattern": [["causal"]]}, "is not text"),
        ({"attention_pattern": ["causal"] * 4}, "cycle of 4 patterns but n_layer=3"),
        ({"attention_pattern": ["causal"] * 5000}, "cycle of 5000 patterns: more than 4096"),
        (
            {"use_sparse_attention": True, "attention_pattern": ["causal", "causal"]},
            "use_sparse_attention=True but attention_pattern=.* causal in every layer: use",
        ),
        ({"rope": {"theta": 500000.0}}, "rope=.*has no effect with position='learned'"),
        ({"rope": {"thet": 1.0}}, "unknown model option 'rope.thet': did you mean 'theta'"),
        ({"rope": 3}, "rope=3 must be a mapping"),
        ({"position": "rope", "n_embed": 36}, "n_embed=36 / n_head=4 gives heads of width 9"),
        ({"moe_num_experts": 1}, "moe_num_experts=1 must be between 2"),
        ({"moe_top_k": 0}, "moe_top_k=0"),
        ({"n_layr": 3}, "unknown model option 'n_layr': did you mean 'n_layer'"),
        ({"schema_version": 99}, "schema_version=99 but this version reads 1"),
    ],
)
def test_every_error_names_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict({**tiny_config().to_dict(), **changes})


@pytest.mark.parametrize(
    "rope,message",
    [
        ({"theta": 1.0}, "rope.theta=1.0 must be above 1"),
        ({"theta": float("inf")}, "rope.theta=inf must be a finite number"),
        ({"theta": "10000"}, "rope.theta='10000' has type str, expected float"),
        ({"layout": "Half"}, "rope.layout='Half' is not one of"),
        ({"scaling": "dynamic"}, "rope.scaling='dynamic' is not one of"),
        ({"factor": 2.0}, "rope.factor=2.0 has no effect with rope.scaling='none'"),
        ({"scaling": "ntk"}, "rope.scaling='ntk' with rope.factor=1.0 stretches nothing"),
        ({"scaling": "linear", "factor": 0.5}, "rope.factor=0.5 stretches nothing"),
        ({"original_context": 512}, "original_context=512 has no effect with rope.scaling='none'"),
        (
            {"scaling": "ntk", "factor": 2, "original_context": 512},
            "original_context=512 has no effect with rope.scaling='ntk'",
        ),
        ({"scaling": "yarn", "factor": 2, "original_context": 0}, "original_context=0 must be"),
        ({"scaling": "yarn", "factor": 2, "original_context": 5.0}, "has type float, expected int"),
    ],
)
def test_rope_errors_name_their_value(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict({"position": "rope", "rope": rope})


def test_rope_round_trips() -> None:
    rope = RoPEConfig(theta=500000, scaling="yarn", factor=4, original_context=6)
    assert (rope.theta, rope.factor) == (500000.0, 4.0)
    config = tiny_config(position="rope", rope=rope)
    data = json.loads(config.to_json())
    assert data["rope"] == {
        "theta": 500000.0, "layout": "half", "scaling": "yarn", "factor": 4.0,
        "original_context": 6,
    }  # fmt: skip
    assert GPT2Config.from_dict(data) == config == GPT2Config.from_dict(config.to_dict())


@pytest.mark.parametrize(
    "given,kept,layers",
    [
        (None, None, ("causal", "causal", "causal")),
        ("causal", "causal", ("causal", "causal", "causal")),
        (" local( 4 )", "local(4)", ("local(4)", "local(4)", "local(4)")),
        (Local(4) | Global(2), "local(4) | global(2)", ("local(4) | global(2)",) * 3),
        (["local(4)"], "local(4)", ("local(4)",) * 3),
        (["local(4)", CAUSAL], ("local(4)", "causal"), ("local(4)", "causal", "local(4)")),
        (
            ("local(4)", "local(4)", "causal"),
            ("local(4)", "local(4)", "causal"),
            ("local(4)", "local(4)", "causal"),
        ),
    ],
)
def test_patterns_are_kept_as_text_and_cycle(given: Any, kept: Any, layers: Any) -> None:
    config = tiny_config(attention_pattern=given)
    assert config.attention_pattern == kept
    assert tuple(map(str, config.patterns)) == layers
    assert config.is_sparse == any(text != "causal" for text in layers)
    assert isinstance(hash(config), int)
    # 续训拿它与 JSON 里读出的比：元组在那里是列表。
    assert config.to_dict()["attention_pattern"] == (
        list(kept) if isinstance(kept, tuple) else kept
    )
    assert GPT2Config.from_json(config.to_json()) == config


def test_sparse_alone_means_the_default_pattern() -> None:
    """窗口是上下文的四分之一；它随上下文变，所以配置里仍记作 None。"""
    config = GPT2Config(use_sparse_attention=True)
    assert set(map(str, config.patterns)) == {"local(256) | global(16)"} and config.is_sparse
    assert config.attention_pattern is None
    assert str(config.replace(context_size=4096).patterns[0]) == "local(1024) | global(16)"
    assert str(config.replace(context_size=1).patterns[0]) == "local(1) | global(1)"
    chosen = GPT2Config(use_sparse_attention=True, attention_pattern="fixed(32, 4)")
    assert str(chosen.patterns[0]) == "fixed(32, 4)"


def test_a_config_of_an_earlier_version_still_loads() -> None:
    """当时还没有 rope、moe 两项；attention_pattern 只有 null。"""
    earlier = {
        "schema_version": 1, "vocab_size": 50257, "context_size": 64, "n_layer": 2, "n_head": 2,
        "n_embed": 16, "dropout": 0.1, "bias": True, "norm": "pre", "norm_type": "layernorm",
        "position": "learned", "tie_weights": True, "n_kv_head": None, "activation": "gelu_tanh",
        "qk_norm": False, "use_sparse_attention": False, "attention_pattern": None,
        "moe_num_experts": 0, "moe_top_k": 2, "attention_backend": "auto",
    }  # fmt: skip
    config = GPT2Config.from_dict(earlier)
    assert not config.is_sparse and config.rope == RoPEConfig()
    assert config.to_dict() | earlier == config.to_dict()


def test_a_pattern_of_a_later_version_names_the_file(tmp_path: Path) -> None:
    data = GPT2Config().to_dict() | {"attention_pattern": "locale(4) | global(2)"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as caught:
        GPT2Config.from_file(path)
    message = str(caught.value)
    assert str(path) in message and "locale(4) | global(2)" in message
    assert message.endswith("unknown pattern 'locale': did you mean 'local'?")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"n_layer": 1e400}'])
def test_junk_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        GPT2Config.from_json(text)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.none()),
    st.sampled_from(["local(4)", "rope", ["causal", "strided(3)"], {"theta": 2}, {"factor": 2}]),
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

"""混合专家的设置：默认的宽度与层，往返，每个坏值被点名并给出改法。"""

from __future__ import annotations

from typing import Any

import pytest

from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.models.transformer.weights.own_folder import expected_shapes

from ..helpers import tiny_config

EIGHT: dict[str, Any] = {"moe_num_experts": 8}


def test_defaults() -> None:
    moe = MoEConfig()
    assert (moe.router, moe.jitter_noise, moe.aux_loss_coef, moe.z_loss_coef) == (
        "softmax_topk", 0.0, 0.01, 0.001,
    )  # fmt: skip
    assert (moe.bias_update_rate, moe.capacity_factor, moe.shared_experts) == (0.0, None, 0)
    assert GPT2Config().moe == moe and GPT2Config().moe_layers == ()


@pytest.mark.parametrize(
    ("changes", "hidden", "shared"),
    [
        ({}, 1536, 0),
        ({"moe_top_k": 4}, 768, 0),
        ({"activation": "swiglu"}, 1024, 0),
        ({"moe": {"shared_experts": 1}}, 1024, 1024),
        ({"moe": {"shared_experts": 2, "shared_hidden": 512}}, 1024, 1024),
        ({"moe": {"hidden": 100, "shared_experts": 1}}, 100, 100),
        ({"moe_top_k": 1, "moe": {"router": "switch"}}, 3072, 0),
        ({"moe_top_k": 7}, 440, 0),
    ],
)
def test_the_default_width_keeps_the_active_products(
    changes: dict[str, Any], hidden: int, shared: int
) -> None:
    config = GPT2Config.from_dict(EIGHT | changes)
    assert (config.expert_hidden, config.shared_hidden) == (hidden, shared)
    if "hidden" not in changes.get("moe", {}):
        active = config.moe_top_k * hidden + shared
        assert abs(active - config.mlp_hidden) <= 4 * config.moe_top_k


@pytest.mark.parametrize(
    ("moe", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"every": 2}, (1, 3, 5)),
        ({"every": 4}, (3,)),
        ({"first_dense": 2}, (2, 3, 4, 5)),
        ({"every": 2, "first_dense": 2}, (3, 5)),
        ({"layers": [0, 4]}, (0, 4)),
    ],
)
def test_layers(moe: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = tiny_config(n_layer=6, **EIGHT, moe=MoEConfig.from_dict(moe))
    assert config.moe_layers == layers
    again = GPT2Config.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    names = expected_shapes(GPT2Model, config)
    assert {int(n.split(".")[1]) for n in names if ".experts." in n} == set(layers)
    assert config.dense().moe_layers == () and config.dense().n_layer == 6


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"moe_num_experts": -1}, "moe_num_experts=-1 must be between 2"),
    ({"moe_num_experts": 1}, "moe_num_experts=1 must be between 2 .*what one expert would be"),
    ({"moe_num_experts": 4, "moe_top_k": 5}, "moe_top_k=5 is above moe_num_experts=4"),
    ({"moe_top_k": 3}, "moe_top_k=3 has no effect with moe_num_experts=0"),
    ({"moe": {"every": 2}}, "moe.every=2 has no effect with moe_num_experts=0"),
    (EIGHT | {"moe_top_k": 0}, "moe_top_k=0"),
    (EIGHT | {"moe_top_k": 1}, "moe.router='softmax_topk' with moe_top_k=1: .*'switch'"),
    (EIGHT | {"moe": {"router": "switch"}}, "moe.router='switch' with moe_top_k=2"),
    (EIGHT | {"moe": {"router": "softmx"}}, "moe.router='softmx' is not one of"),
    (EIGHT | {"moe": {"ruoter": "switch"}}, "unknown model option 'moe.ruoter': .* 'router'"),
    (EIGHT | {"moe": 3}, "moe=3 must be a mapping"),
    (EIGHT | {"moe": {"bias_update_rate": 0.001}}, "bias_update_rate=0.001 with moe.router="),
    (EIGHT | {"moe": {"aux_loss_coef": -1}}, "moe.aux_loss_coef=-1.0 must be between"),
    (EIGHT | {"moe": {"z_loss_coef": float("nan")}}, "moe.z_loss_coef=nan must be a finite"),
    (EIGHT | {"moe": {"jitter_noise": 1.0}}, "moe.jitter_noise=1.0 must be in"),
    (EIGHT | {"moe": {"capacity_factor": 0.0}}, "moe.capacity_factor=0.0 must be above 0"),
    (
        {"moe_num_experts": 64, "context_size": 16, "moe": {"capacity_factor": 0.5}},
        "capacity_factor=0.5 leaves an expert 0.25 .*context_size=16 .*moe_num_experts=64.*least 2",
    ),
    (EIGHT | {"moe": {"hidden": 0}}, "moe.hidden=0 must be between 1"),
    (EIGHT | {"moe": {"shared_hidden": 8}}, "shared_hidden=8 has no effect with .*experts=0"),
    (
        EIGHT | {"moe": {"shared_experts": 2, "shared_hidden": 2000}},
        "shared_experts=2 x moe.shared_hidden=2000 is not below the dense width 3072",
    ),
    (EIGHT | {"moe": {"layers": [2, 1]}}, r"moe.layers=\[2, 1\] must rise"),
    (EIGHT | {"moe": {"layers": []}}, r"moe.layers=\[\] must be a list"),
    (EIGHT | {"moe": {"layers": [1.5]}}, r"moe.layers=\[1.5\] must be a list"),
    (EIGHT | {"moe": {"layers": [1, 12]}}, r"moe.layers=\[1, 12\].*do not fit n_layer=12"),
    (EIGHT | {"moe": {"layers": [-1]}}, r"moe.layers=\[-1\].*do not fit n_layer=12"),
    (EIGHT | {"moe": {"layers": [1], "every": 2}}, r"moe.layers=\[1\] with moe.every=2"),
    (EIGHT | {"moe": {"first_dense": 12}}, "moe.first_dense=12 do not fit n_layer=12"),
    (EIGHT | {"moe": {"every": 13}}, "moe.every=13 .*do not fit n_layer=12"),
)


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_values_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict(data)

"""拼成的矩阵：各部分正好铺满，次序与前向一致；知道它们的只有一处。"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from app.models.transformer import GPT2Model, MoEConfig
from app.models.transformer.config import GATED
from app.models.transformer.layers.fused import attention_parts, feed_forward_parts, parts_of
from app.models.transformer.mlp import ACTIVATIONS, MLP

from ..helpers import tiny_config

APP = Path(__file__).parents[3] / "app"


@pytest.mark.parametrize("activation", ["gelu", *sorted(GATED)])
def test_parts_fill_every_matrix_of_a_model(activation: str) -> None:
    config = tiny_config(
        n_head=4, n_kv_head=2, activation=activation, moe_num_experts=4,
        moe=MoEConfig(shared_experts=1, layers=(1,)),
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT2Model(config)
    several = set()
    for name, weight in model.named_parameters():
        parts = parts_of(name, weight.shape[1 if weight.ndim == 3 else 0], config)
        if weight.ndim > 1:
            assert sum(parts.values()) == weight.shape[-2], name
        if len(parts) > 1 and name.endswith(".weight"):
            several.add(name.split(".", 2)[2])
    gated = {"mlp.c_fc.weight", "mlp.experts.c_fc.weight", "mlp.shared.c_fc.weight"}
    assert several == {"attn.c_attn.weight"} | (gated if activation in GATED else set())


def test_the_names_of_the_parts() -> None:
    config = tiny_config(n_embed=24, n_head=4, n_kv_head=2, activation="swiglu")
    assert attention_parts(config) == {"q": 24, "k": 12, "v": 12}
    assert parts_of("h.0.attn.c_attn.bias", 48, config) == attention_parts(config)
    assert parts_of("c_fc", 128, config) == {"gate": 64, "up": 64}
    assert feed_forward_parts(config.replace(activation="relu"), 64) == {"up": 64}
    assert parts_of("mlp.c_proj.weight", 24, config) == {"c_proj": 24}


def test_gate_and_up_are_what_the_mlp_takes_them_for() -> None:
    config = tiny_config(activation="swiglu", bias=False, dropout=0.0)
    torch.manual_seed(0)
    mlp = MLP(config).double()
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(3, config.n_embed, dtype=torch.float64)
    sizes = parts_of("c_fc", len(mlp.c_fc.weight), config)
    part = dict(zip(sizes, mlp.c_fc.weight.split(list(sizes.values())), strict=True))
    want = (F.silu(x @ part["gate"].T) * (x @ part["up"].T)) @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_activation_halves_and_no_other_does(activation: str) -> None:
    width = ACTIVATIONS[activation](torch.ones(1, 8)).shape[1]
    assert width == (4 if activation in GATED else 8)


def test_no_other_file_asks_for_one_gated_activation_or_where_the_final_norm_is() -> None:
    """加一种有门的激活、一种归一化位置时，不必去找散落的比较。"""
    found = set()
    for path in APP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if values & {"pre", *GATED}:
                    found.add(path.name)
    assert found == {"config.py", "block.py"}

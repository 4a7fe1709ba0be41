"""运算量：与手算、与 torch 自己数的一致。"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.planning.flops import flops_per_token, product_weights
from tests.models.helpers import VARIANTS, tiny_config, tokens


def test_gpt2_small_by_hand() -> None:
    config = GPT2Config(vocab_size=50257, norm="pre")
    layer = 768 * (3 * 768 + 768 + 4 * 768 + 4 * 768)
    weights = 12 * layer + 50257 * 768
    assert product_weights(config) == weights
    found = flops_per_token(config)
    assert found.dense == 2 * weights
    # 因果：平均看见 (1 + 1024) / 2 个键；q·k 与加权的 v 各 2·768。
    assert found.attention == pytest.approx(12 * 4 * 768 * 1025 / 2)
    assert found.forward == found.dense + found.attention
    assert found.total == 3 * found.forward and found.exact


def test_the_six_n_rule() -> None:
    """Kaplan：不算注意力时 6N，N 是进矩阵乘的权重。"""
    config = GPT2Config(norm="pre", bias=False, tie_weights=False)
    found = flops_per_token(config)
    assert 3 * found.dense == 6 * product_weights(config)


def test_only_the_chosen_experts_count() -> None:
    """默认的宽度下，k 个专家的乘法就是稠密前馈的，另加路由器。"""
    dense = tiny_config()
    mixed = dense.replace(moe_num_experts=8, moe=MoEConfig(layers=(0, 2)))
    assert product_weights(mixed) == product_weights(dense) + 2 * 8 * 32
    shared = mixed.replace(moe=MoEConfig(layers=(1,), hidden=40, shared_experts=1))
    changed = 2 * 32 * (3 * 40 - dense.mlp_hidden) + 8 * 32
    assert product_weights(shared) == product_weights(dense) + changed


def test_only_visible_pairs_count() -> None:
    local = tiny_config(attention_pattern="local(5)")
    pairs = sum(min(5, q + 1) for q in range(24))
    assert flops_per_token(local).attention == pytest.approx(3 * 4 * 32 * pairs / 24)
    cycle = tiny_config(attention_pattern=("local(5)", "causal"))
    causal = 24 * 25 / 2
    wanted = 4 * 32 * (2 * pairs + causal) / 24
    assert flops_per_token(cycle).attention == pytest.approx(wanted)
    assert flops_per_token(tiny_config(), 1).attention == 3 * 4 * 32


@pytest.mark.parametrize(
    "name", ["pre", "keel", "untied", "grouped", "swiglu", "relu2", "rope", "qk_norm"]
)
def test_torch_counts_the_same(name: str) -> None:
    """参考后端把 T² 对都算，所以注意力按 T² 对比较；其余一次不差。"""
    config = tiny_config(**VARIANTS[name]).replace(attention_backend="reference")
    model, rows, length = GPT2Model(config), 2, 24
    with FlopCounterMode(display=False) as counter:
        out = model(tokens(rows, length))["logits"]
        forward = counter.get_total_flops()
        out.sum().backward()
    count = rows * length
    found = flops_per_token(config)
    everything = config.n_layer * 4 * config.n_embed * length
    assert forward == count * (found.dense + everything)
    assert counter.get_total_flops() == 3 * forward


def test_the_chunked_loss_costs_three_products() -> None:
    """前向里就求好的梯度不另算：输出头的前向与反向合起来仍是三次。"""

    def addmm(out: torch.Size, a: torch.Size, b: torch.Size, **rest: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    model = GPT2Model(tiny_config(norm="pre"))
    ids = tokens(2, 24)
    # torch 不数就地的 addmm_。
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        model(ids, targets=ids)["loss"].backward()
    chunked = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)["logits"]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert chunked == counter.get_total_flops()


def test_a_million_tokens_are_counted_from_a_sample() -> None:
    config = tiny_config(position="rope", attention_pattern="local(8) | strided(24)")
    assert not flops_per_token(config, 1_000_000).exact

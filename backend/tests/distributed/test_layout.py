"""切与拼互为反面；拼成的矩阵按部分切。"""

from __future__ import annotations

import pytest
import torch

from app.distributed.ways.layout import Cut, cut, cut_of, join
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.settings.moe_config import MoEConfig

CONFIG = GPT2Config(
    vocab_size=48, context_size=8, n_layer=2, n_head=4, n_kv_head=2, n_embed=16,
    activation="swiglu", tie_weights=False, qk_norm=True, moe_num_experts=4,
    moe=MoEConfig(layers=(1,)), norm="keel",
)  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_joined_pieces_are_the_whole(size: int) -> None:
    seen = set()
    model = GPT2Model(CONFIG)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, whole in tensors.items():
        rule = cut_of(name, whole.shape, CONFIG)
        if rule is not None and any(part % size for part in rule.parts):
            with pytest.raises(ValueError, match="cannot be cut evenly over"):
                cut(whole, rule, 0, size)
            continue
        pieces = [cut(whole, rule, rank, size) for rank in range(size)]
        assert torch.equal(join(pieces, rule), whole), name
        if rule is not None:
            assert pieces[0].numel() * size == whole.numel(), name
            seen.add(rule.axis)
    assert seen == {"tensor", "expert"}


def test_which_weights_are_cut() -> None:
    shapes = {name: p.shape for name, p in GPT2Model(CONFIG).named_parameters()}
    rules = {name: cut_of(name, shape, CONFIG) for name, shape in shapes.items()}
    tensor = {name for name, rule in rules.items() if rule and rule.axis == "tensor"}
    assert tensor == {
        "embed.wte.weight", "lm_head.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias",
        "h.0.mlp.c_proj.weight",
        *(f"h.{i}.attn.{leaf}" for i in (0, 1) for leaf in (
            "c_attn.weight", "c_attn.bias", "c_proj.weight")),
    }  # fmt: skip
    experts = {name for name, rule in rules.items() if rule and rule.axis == "expert"}
    assert experts == {name for name in shapes if ".experts." in name}


def test_fused_matrices_are_cut_by_their_parts() -> None:
    rows = torch.arange(32)
    queries_and_keys = Cut("tensor", 0, (16, 8, 8))
    want = [*range(8), *range(16, 20), *range(24, 28)]
    assert cut(rows, queries_and_keys, 0, 2).tolist() == want
    assert cut(rows, Cut("tensor", 0, (16, 16)), 1, 2).tolist() == [
        *range(8, 16), *range(24, 32),
    ]  # fmt: skip


def test_a_part_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^9 rows .*2 tensor ranks: use .* divides 9"):
        cut(torch.zeros(9), Cut("tensor", 0, (9,)), 0, 2)

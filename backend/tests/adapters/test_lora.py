"""研究的试验 5：LoRA 的开始、并入、冻结，各种形状。

C 宽度、r 秩。
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from app.adapters.adapter import Adapter, merged
from app.adapters.lora import loras
from app.adapters.trainable import apply_trainable
from app.generation.sampling import SamplingConfig
from app.models.transformer import GPT2Model
from app.models.transformer.factory import create_gpt2_small
from app.models.transformer.settings.tune_config import TuneConfig
from app.training.machine.recompute import checkpoint_blocks

from ..generation.helpers import new_tokens
from ..models.helpers import VARIANTS, tiny_model, tokens

LORA = TuneConfig(trainable="lora", lora_rank=3, lora_alpha=7.0)
SHAPES = ["pre", "post", "keel", "untied", "grouped", "multi-query", "swiglu", "rope", "moe",
          "moe swiglu rope", "moe switch"]  # fmt: skip


def tuned(dtype: torch.dtype = torch.float64, tune: TuneConfig = LORA, **changes: Any) -> GPT2Model:
    """B 不为零的：训练过一阵的样子。"""
    model = tiny_model(dtype, **changes)
    apply_trainable(model, tune)
    for _, leaf in loras(model):
        torch.nn.init.normal_(leaf.lora_B, std=0.3)
    return model


def logits(model: GPT2Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)["logits"]


@pytest.mark.parametrize("name", SHAPES)
def test_it_starts_as_the_base_to_the_bit_and_merges_within_rounding(name: str) -> None:
    base, ids = tiny_model(**VARIANTS[name]), tokens(2, 11)
    model = copy.deepcopy(base)
    apply_trainable(model, LORA)
    assert torch.equal(logits(model, ids), logits(base, ids))
    for _, leaf in loras(model):
        torch.nn.init.normal_(leaf.lora_B, std=0.3)
    ours = logits(model, ids)
    assert (ours - logits(base, ids)).abs().max() > 0.1
    assert (logits(merged(model), ids) - ours).abs().max() <= 1e-12


def test_merged_in_float32() -> None:
    model, ids = tuned(torch.float32, scale=1.0), tokens(2, 11)
    assert (logits(merged(model), ids) - logits(model, ids)).abs().max() <= 2e-6


def test_the_sum_counts_alpha_over_rank_times() -> None:
    model = tuned()
    leaf = model.h["0"].attn.c_attn
    wanted = leaf.weight + 7.0 / 3.0 * (leaf.lora_B @ leaf.lora_A)
    assert torch.equal(merged(model).h["0"].attn.c_attn.weight, wanted)


def test_q_k_and_v_share_one_a() -> None:
    model = tuned(n_kv_head=2)
    leaf = model.h["0"].attn.c_attn
    assert leaf.lora_A.shape == (3, model.config.n_embed)
    assert leaf.lora_B.shape == (leaf.weight.shape[0], 3)


@pytest.mark.parametrize("name", ["pre", pytest.param("moe", marks=pytest.mark.slow)])
def test_frozen_tensors_stay_to_the_bit_over_fifty_steps(name: str) -> None:
    model, ids = tuned(torch.float32, **VARIANTS[name]), tokens(2, 9)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    for _ in range(50):
        model(ids, targets=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for name_, p in model.named_parameters():
        assert torch.equal(p, before[name_]) is (".lora_" not in name_), name_


@pytest.mark.parametrize("name", ["pre", "moe"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    """冻结的嵌入没有梯度：可重入的重算会让适配器也没有（transformers PR42494）。"""
    model, ids = tuned(**VARIANTS[name]).train(), tokens(2, 9)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, targets=ids)["loss"].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    checkpoint_blocks(model, range(model.config.n_layer))
    again = gradients()
    assert len(plain) == len(again) == 2 * len(list(loras(model)))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(plain, again, strict=True))


def test_the_experts_of_the_reference_path_have_their_adapters() -> None:
    from app.models.transformer.config import MoEConfig

    ids = tokens(2, 9)
    model = tuned(moe_num_experts=4, moe=MoEConfig(dispatch="sorted"))
    slow = tuned(moe_num_experts=4, moe=MoEConfig(dispatch="reference"))
    slow.load_state_dict(model.state_dict())
    assert (logits(model, ids) - logits(slow, ids)).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["pre", "moe", "moe switch"])
def test_samples_drawn_during_training_have_the_adapters(name: str) -> None:
    """生成另有捷径，逐个读权重；漏掉适配器的话，样文就是原模型的。"""
    model = tuned(torch.float32, scale=1.0, **VARIANTS[name])
    settings = {"max_new_tokens": 8, "sampling": SamplingConfig(temperature=0.0)}
    prompts = [[3, 1, 4], [5, 9]]
    assert new_tokens(model, prompts, **settings) == new_tokens(merged(model), prompts, **settings)


def test_a_sum_in_bfloat16_is_rounded_once() -> None:
    model = tuned(torch.float32)
    half = copy.deepcopy(model).bfloat16()
    other = half.h["0"].attn.c_attn
    pair = other.lora_B.float() @ other.lora_A.float()
    wanted = (other.weight.float() + 7.0 / 3.0 * pair).bfloat16()
    assert torch.equal(merged(half).h["0"].attn.c_attn.weight, wanted)


def test_small_rank_8_trains_one_percent() -> None:
    with torch.device("meta"):
        model = create_gpt2_small()
        whole = sum(p.numel() for p in model.parameters())
        said = apply_trainable(model, TuneConfig(trainable="lora"))
    assert said.trained == 1_179_648 and said.frozen == whole
    assert said.trained < 0.01 * whole
    # 一份权重与 AdamW 的两个矩，比原模型的一份权重。
    assert 3 * said.trained < 0.03 * whole
    assert said.line.startswith("trains 1,179,648 of ") and "(0.939%): LoRA (rank 8" in said.line


def test_only_the_named_targets() -> None:
    model = tuned(tune=TuneConfig(trainable="lora", lora_targets=("qkv", "down")))
    assert {n.partition(".")[2].partition(".")[2] for n, _ in loras(model)} == {
        "attn.c_attn", "mlp.c_proj",
    }  # fmt: skip


def test_what_cannot_be_right_is_refused() -> None:
    model = tuned()
    with pytest.raises(ValueError, match="already has adapters: merge"):
        apply_trainable(model, LORA)
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 but h\.\d\.mlp\.experts\.c_fc holds"):
        apply_trainable(
            tiny_model(moe_num_experts=4), TuneConfig(trainable="lora", lora_dropout=0.1)
        )
    with pytest.raises(ValueError, match="has no adapters: it is saved whole"):
        Adapter.of(tiny_model())

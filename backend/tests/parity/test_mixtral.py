"""与 transformers 的 Mixtral 对照，随机的小权重：它存的我们读、我们写的它读，logits 与均衡损失。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from app.interop.export import export
from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.models.transformer.settings.rope_config import RoPEConfig
from app.models.transformer.weights.families import FAMILIES, read_config, why_not, write_config

transformers = pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")

VOCAB, CONTEXT = 61, 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral(**changes: Any) -> Any:
    """偏离初值的随机权重：1 与 0 藏得住错。"""
    config = transformers.MixtralConfig(**SHAPE | changes, bos_token_id=None, eos_token_id=None)
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ids() -> Tensor:
    return torch.randint(VOCAB, (3, CONTEXT))


def in_double(monkeypatch: pytest.MonkeyPatch, theirs: Any) -> Any:
    """它的归一化、路由与 RoPE 一律在 float32 里算；换成 float64，才看得出 1e-10。"""
    module = transformers.models.mixtral.modeling_mixtral

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(module.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    theirs = theirs.double()
    # 它的 grouped_mm 没有 float64。
    theirs.set_experts_implementation("eager")
    size = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    theta = theirs.config.rope_parameters["rope_theta"]
    frequency = theta ** (-torch.arange(0, size, 2).double() / size)

    def rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (position_ids[..., None].double() * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    monkeypatch.setattr(module.MixtralRotaryEmbedding, "forward", rotary)
    return theirs


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "num_experts_per_tok": 3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
])  # fmt: skip
def test_their_folder_read_here(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = mixtral(**changes)
    theirs.save_pretrained(tmp_path)
    ours, tokens = GPT2Model.from_pretrained(tmp_path), ids()
    with torch.no_grad():
        wanted = theirs(tokens).logits
        assert (ours(tokens)["logits"] - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(1)
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())


def test_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = mixtral()
    theirs.double().save_pretrained(tmp_path)
    theirs = in_double(monkeypatch, theirs)
    ours, tokens = GPT2Model.from_pretrained(tmp_path), ids()
    with torch.no_grad():
        out = theirs(tokens, output_router_logits=True, labels=tokens)
        mine = ours(tokens)
    assert (mine["logits"] - out.logits).abs().max() < 1e-10
    loads = [load_balancing(one, 2, 5) for one in out.router_logits]
    wanted = ours.config.moe.aux_loss_coef * sum(loads) / len(loads)
    assert abs(float(mine["aux_loss"] - wanted)) < 1e-10


def load_balancing(logits: Tensor, k: int, experts: int) -> Tensor:
    """一层的；它把各层的词元接在一起算一次，我们各层取平均，所以逐层比。"""
    module = transformers.models.mixtral.modeling_mixtral
    found: Tensor = module.load_balancing_loss_func((logits,), experts, k)
    return found


def our_model(**changes: Any) -> GPT2Model:
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "context_size": CONTEXT, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
        "n_embed": 32, "dropout": 0.0, "bias": False, "norm": "pre", "norm_type": "rmsnorm",
        "position": "rope", "activation": "swiglu", "moe_num_experts": 4, "tie_weights": False,
        "rope": RoPEConfig(theta=2000.0), "moe": MoEConfig(hidden=24),
    }  # fmt: skip
    return GPT2Model(GPT2Config(**values | changes)).eval()


@pytest.mark.parametrize("target", ["hf", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_our_export_read_there_and_back(target: Any, tied: bool, tmp_path: Path) -> None:
    ours = our_model(tie_weights=tied)
    done = export(ours, None, target, tmp_path / "out")
    assert done.kind == "mixtral" and not isinstance(done.checked, str)
    assert done.checked.difference < 1e-5
    back = GPT2Model.from_pretrained(tmp_path / "out")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert back.config.replace(moe=ours.config.moe) == ours.config


def test_the_files_have_the_names_that_save_pretrained_writes(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "theirs")
    ours = GPT2Model.from_pretrained(tmp_path / "theirs")
    export(ours, None, "mixtral", tmp_path / "ours")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert "model.layers.1.block_sparse_moe.experts.4.w3.weight" in one


@pytest.mark.parametrize("change, words", [
    ({"sliding_window": 8}, "sliding_window=8 means attention within a window"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06 means another epsilon"),
    ({"head_dim": 16}, "head_dim=16 but hidden_size=32 / num_attention_heads=4"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' means scaled"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not one of silu"),
    ({"num_experts_per_tok": 9}, "moe_top_k=9 is above moe_num_experts=5"),
])  # fmt: skip
def test_what_has_no_counterpart_is_refused_here(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config({"model_type": "mixtral", **SHAPE, **change}, "config.json")


@pytest.mark.parametrize("change, words", [
    ({"moe": MoEConfig(hidden=24, router="sigmoid")}, "moe.router='sigmoid'"),
    ({"moe": MoEConfig(hidden=24, shared_experts=1)}, "moe.shared_experts=1"),
    ({"moe": MoEConfig(hidden=24, every=2)}, r"experts in layers \[1\]"),
    ({"moe": MoEConfig(), "moe_num_experts": 0}, "moe_num_experts=0"),
    ({"bias": True}, "bias=True"),
    ({"rope": RoPEConfig(layout="interleaved")}, "plain rotary"),
    ({"norm": "keel"}, "norm='keel'"),
    ({"activation": "silu"}, "activation='silu'"),
    ({"attention_pattern": "local(4)"}, "sparse attention"),
])  # fmt: skip
def test_what_has_no_counterpart_is_refused_there(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"cannot become mixtral: .*{words}"):
        export(our_model(**change), None, "mixtral", tmp_path / "out")


def test_the_configuration_survives_both_ways() -> None:
    config = our_model().config
    raw = json.loads(json.dumps(write_config(FAMILIES["mixtral"], config)))
    again = read_config(raw, "config.json")
    assert again.replace(moe=config.moe) == config and again.expert_hidden == 24
    assert why_not(FAMILIES["mixtral"], config) is None

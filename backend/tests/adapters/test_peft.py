"""与 PEFT 互通：它的文件这里读得懂，这里的它装得起，训练的每一步也相同（试验 5）。

E 专家数、V 词表。
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.adapters.adapter import Adapter
from app.adapters.files import read_adapter, write_adapter
from app.adapters.lora import loras
from app.adapters.rows import grow_vocabulary
from app.adapters.trainable import apply_trainable
from app.interop.equivalent import Weights
from app.interop.hf import write_hf
from app.models.transformer import GPT2Model
from app.models.transformer.settings.tune_config import TuneConfig

from ..models.helpers import tiny_model, tokens

transformers = pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
peft = pytest.importorskip("peft", reason="pip install 'gpt2-workbench[dev]'")

TUNE = TuneConfig(trainable="lora", lora_rank=4, lora_alpha=8.0)
MODULES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
# 一共几种：GPT-2、GPT-1，与只有自带代码的。
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "pre"},
    "openai-gpt": {"norm": "post"},
    "own": {"norm": "pre", "position": "rope", "n_kv_head": 2, "activation": "swiglu"},
    "experts": {"norm": "pre", "moe_num_experts": 3},
}


def base(kind: str, **changes: Any) -> GPT2Model:
    return tiny_model(dropout=0.0, **KINDS[kind], **changes)


def twin(model: GPT2Model, kind: str, folder: Path) -> nn.Module:
    """同样权重的 transformers 的模型。"""
    if kind in ("own", "experts"):
        from app.interop.transformers.convert import wrap

        return wrap(copy.deepcopy(model))
    write_hf(Weights.of(model), kind, None, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def tuned(model: GPT2Model, new: range = range(0)) -> GPT2Model:
    apply_trainable(model, TUNE, new)
    for _, leaf in loras(model):
        nn.init.normal_(leaf.lora_B, std=0.2)
    return model


def largest(model: GPT2Model, other: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = model(ids)["logits"], other(ids).logits
    return float((ours - theirs[..., : ours.shape[-1]]).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_ours_loads_in_peft(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    other = twin(model, kind, tmp_path / "hf")
    tuned(model)
    (tmp_path / "adapter").mkdir()
    write_adapter(Adapter.of(model), model.config, TUNE, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    assert largest(model, loaded, tokens(2, 11)) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_loads_here(kind: str, tmp_path: Path) -> None:
    model = base(kind)
    if kind == "experts":
        modules = MODULES[:2]
        more = {"target_parameters": ["experts.c_fc.weight", "experts.c_proj.weight"]}
    else:
        modules, more = MODULES, {}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM",
        fan_in_fan_out=kind in ("gpt2", "openai-gpt"), **more,
    )  # fmt: skip
    other = peft.get_peft_model(twin(model, kind, tmp_path / "hf"), config).eval()
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    other.save_pretrained(tmp_path / "adapter")
    read_adapter(tmp_path / "adapter", model.config).merge_into(model)
    assert largest(model, other, tokens(2, 11)) <= 1e-10


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_go_both_ways(tied: bool, tmp_path: Path) -> None:
    plain = base("gpt2", tie_weights=tied)
    grown = base("gpt2", tie_weights=tied)
    grown.load_state_dict(plain.state_dict())
    new = grow_vocabulary(grown, 3)
    other = twin(grown, "gpt2", tmp_path / "hf")
    tuned(grown, new)
    for name, parameter in grown.named_parameters():
        if name.endswith(".rows"):
            nn.init.normal_(parameter)
    folder, ids = tmp_path / "adapter", torch.tensor([[3, *new, 5, 36]])
    folder.mkdir()
    write_adapter(Adapter.of(grown), grown.config, TUNE, folder)
    loaded = peft.PeftModel.from_pretrained(other, folder).eval()
    assert largest(grown, loaded, ids) <= 1e-10
    loaded.save_pretrained(tmp_path / "again")
    read_adapter(tmp_path / "again", plain.config).merge_into(plain)
    assert largest(plain, loaded, ids) <= 1e-10


def test_ten_steps_are_those_of_peft(tmp_path: Path) -> None:
    model = base("gpt2")
    other = twin(model, "gpt2", tmp_path / "hf")
    apply_trainable(model, TUNE)
    (tmp_path / "adapter").mkdir()
    write_adapter(Adapter.of(model), model.config, TUNE, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "adapter", is_trainable=True)
    sides: list[tuple[nn.Module, torch.optim.Optimizer]] = []
    for side in (model, theirs):
        trained = [p for p in side.parameters() if p.requires_grad]
        sides.append((side, torch.optim.AdamW(trained, lr=1e-2)))
    for step in range(10):
        batch = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(step))
        losses = []
        for side, optimizer in sides:
            out = side(batch[:, :-1])
            # transformers 的损失先把 logits 降到 float32：自己算。
            found = out["logits"].flatten(0, 1)
            loss = nn.functional.cross_entropy(found, batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) <= 1e-10, step
    assert largest(model.eval(), theirs.eval(), tokens(2, 11)) <= 1e-8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' but only LORA"),
        ({"use_dora": True}, "use_dora=True has no counterpart"),
        ({"alpha_pattern": {"c_attn": 3}}, "alpha_pattern=.* has no counterpart"),
        ({"bias": "all"}, "bias='all' has no counterpart"),
    ],
)
def test_what_is_not_ours_to_compute_is_refused(
    change: dict[str, Any], match: str, tmp_path: Path
) -> None:
    model = base("gpt2")
    tuned(model)
    write_adapter(Adapter.of(model), model.config, TUNE, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        read_adapter(tmp_path, model.config)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = base("gpt2")
    tuned(model)
    write_adapter(Adapter.of(model), model.config, TUNE, tmp_path)
    with pytest.raises(ValueError, match="does not fit the base .*n_layer=1"):
        read_adapter(tmp_path, model.config.replace(n_layer=1))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn: A \(4, 32\) and B .* do not fit"):
        read_adapter(tmp_path, model.config.replace(n_embed=64))

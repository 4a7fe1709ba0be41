"""last:K、head、点名：训练什么，冻结什么。"""

from __future__ import annotations

import pytest

from app.adapters.trainable import apply_trainable
from app.models.transformer import GPT2Model
from app.models.transformer.settings.tune_config import TuneConfig

from ..models.helpers import tiny_model


def trained(model: GPT2Model, trainable: str) -> set[str]:
    said = apply_trainable(model, TuneConfig(trainable=trainable))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert said.trained == sum(p.numel() for p in named.values())
    assert said.trained + said.frozen == model.num_parameters()
    return set(named)


def test_the_last_layers_and_the_final_norm() -> None:
    model = tiny_model(norm="pre")
    n = model.config.n_layer
    assert {name.split(".")[0] for name in trained(model, "last:1")} == {"h", "ln_f"}
    assert {name.split(".")[1] for name in trained(model, "last:1") if name[0] == "h"} == {
        str(n - 1)
    }
    assert trained(model, f"last:{n}") < trained(model, "all")
    with pytest.raises(ValueError, match=f"last:9 but the model has {n} layers: use last:{n}"):
        trained(model, "last:9")


def test_the_head_is_the_embedding_when_tied() -> None:
    assert trained(tiny_model(), "head") == {"embed.wte.weight"}
    assert trained(tiny_model(tie_weights=False), "head") == {"lm_head.weight"}


def test_names() -> None:
    model = tiny_model(norm="pre")
    assert trained(model, "h.*.ln_1.weight, ln_f.*") == {
        *(f"h.{i}.ln_1.weight" for i in range(model.config.n_layer)), "ln_f.weight", "ln_f.bias",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"'h\.0\.ln1\.weight', which names no parameter: did you"):
        trained(model, "ln_f.*,h.0.ln1.weight")


def test_new_tokens_must_be_trained_by_somebody() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"2 new tokens \(35\.\.36\) but tune\.trainable=last:1"):
        apply_trainable(model, TuneConfig(trainable="last:1"), range(35, 37))
    names = TuneConfig(trainable="h.*,embed.wte.weight")
    assert apply_trainable(model, names, range(35, 37)).trained

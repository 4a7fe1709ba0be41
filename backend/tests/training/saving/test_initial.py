"""init_from：只取权重，从第 0 步开始；形状、分词器不同就拒绝，点名两个值。"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from app.data.tokenizers import CharTokenizer
from app.models.transformer import GPT2Model, MoEConfig
from app.training.config import OptimConfig, TrainConfig
from app.training.saving.checkpoint import list_steps

from ..conftest import train


def weights(run):
    return load_file(run / "model.safetensors")


@pytest.fixture
def first(make, tmp_path):
    return train(make(out=str(tmp_path / "first"))).checkpoint


def test_only_the_weights_are_taken(make, first, tmp_path):
    told: list[str] = []
    config = make(init_from=str(first.parent), optim=OptimConfig(lr=1e-12), steps=5)
    done = train(config, told)
    assert any(line.startswith(f"weights from {first}") for line in told)
    before, after = weights(first), weights(done.checkpoint)
    assert all(torch.allclose(before[n], after[n], atol=1e-9) for n in before)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5]
    assert [step for step, _ in list_steps(tmp_path / "run")] == [5]


def test_resuming_goes_on_from_the_run_and_not_from_there(make, first, tmp_path):
    straight = train(make(init_from=str(first), steps=6, out=str(tmp_path / "a"))).checkpoint
    train(make(init_from=str(first), steps=6, save_every=3, out=str(tmp_path / "b"), keep_last=9))
    import shutil

    shutil.rmtree(tmp_path / "b" / "step-00000006")
    again = train(make(init_from=str(first), steps=6, out=str(tmp_path / "b"), resume="auto"))
    one, other = weights(straight), weights(again.checkpoint)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_change_the_shape_may_differ(make, first):
    config = make(init_from=str(first), steps=5, optim=OptimConfig(lr=1e-12))
    assert config.model.dropout != 0.0
    done = train(config.replace(model=config.model.replace(dropout=0.0)))
    before, after = weights(first), weights(done.checkpoint)
    assert all(torch.allclose(before[n], after[n], atol=1e-9) for n in before)


@pytest.mark.parametrize("change, words", [
    ({"n_embed": 32}, r"model.n_embed=32 but init_from=\S+ has 16"),
    ({"norm": "keel"}, "model.norm='keel' but init_from=.* has 'post'"),
    ({"moe_num_experts": 4, "moe": MoEConfig(hidden=64)}, "model.moe_num_experts=4 but .* has 0"),
])  # fmt: skip
def test_another_shape_is_refused(make, first, change, words):
    config = make(init_from=str(first))
    with pytest.raises(ValueError, match=words):
        train(config.replace(model=config.model.replace(**change)))


def test_another_tokenizer_is_refused(make, tmp_path):
    config = make(init_from=str(tmp_path / "other"))
    GPT2Model(config.model).save_pretrained(tmp_path / "other")
    CharTokenizer("xyz").save(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained with the tokenizer"):
        train(config)


def test_it_is_one_source_of_weights():
    with pytest.raises(ValueError, match="init_from=a and resume=b both give the weights"):
        TrainConfig(init_from="a", resume="b")
    with pytest.raises(ValueError, match="init_from is empty"):
        TrainConfig(init_from="")

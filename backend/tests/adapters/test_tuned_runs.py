"""一次 lora 训练的检查点：只有适配器；续训、装入、并入、原模型换了或搬走。"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.adapters.load import open_model
from app.cli.main import main
from app.cli.shared.trained import load_model, load_trained
from app.common.files import sha256_file
from app.models.transformer import GPT2Model
from app.training.config import TrainConfig, TuneConfig
from app.training.run import train

from ..models.helpers import tokens
from ..training.conftest import write_dataset

LORA = TuneConfig(trainable="lora", lora_rank=2)


def go(out: Path, data: Path, **changes: Any) -> Path:
    """训练；返回最后的检查点。"""
    values: dict[str, Any] = {
        "model": {"vocab_size": 32, "context_size": 8, "n_layer": 2, "n_head": 2, "n_embed": 16,
                  "dropout": 0.1, "norm": "pre"},
        "data": {"folder": str(data)}, "optim": {"lr": 1e-2}, "schedule": {"warmup_steps": 2},
        "out": str(out), "steps": 6, "batch_size": 4, "micro_batch": 2, "precision": "float32",
        "eval_every": 0, "eval_batches": 1, "sample_tokens": 0, "sample_every": 0,
        "save_every": 0, "device": "cpu",
    }  # fmt: skip
    config = TrainConfig.from_dict(values | {k: v for k, v in changes.items() if k != "told"})
    return train(config, lambda plan: None, changes.get("told", []).append).checkpoint


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module", autouse=True)
def no_plot() -> Iterator[None]:
    """画图占一秒。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.training.run.plot_losses", lambda run: None)
        yield


@pytest.fixture(scope="session")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("runs") / "base", data)


@pytest.fixture(scope="session")
def tuned(base: Path, data: Path) -> Path:
    return go(base.parents[1] / "tuned", data, init_from=str(base), tune=vars(LORA))


def test_the_checkpoint_has_the_adapter_alone(base: Path, tuned: Path) -> None:
    names = {path.name for path in tuned.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "base.json"} <= names
    assert "model.safetensors" not in names
    said = json.loads((tuned / "base.json").read_text())
    assert said["path"] == str(base.resolve()) and said["relative"] == "../../base/step-00000006"
    moments = load_file(tuned / "optim.safetensors")
    assert moments and all(".lora_" in name for name in moments)


def test_every_command_gets_the_sum(base: Path, tuned: Path) -> None:
    trained, plain = load_trained(tuned.parent, "cpu"), load_trained(base, "cpu")
    assert trained.folder == tuned and type(trained.model) is GPT2Model
    one, two = trained.model.state_dict(), plain.model.state_dict()
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    ends = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"h.{i}.{end}.weight" for i in range(2) for end in ends}
    assert len(trained.weights_sha256()) == 64


@pytest.mark.parametrize("k", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3, 5))])
def test_resumed_is_straight_to_the_bit(
    k: int, base: Path, tuned: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go(run, data, init_from=str(base), tune=vars(LORA), save_every=k, keep_last=9)
    for step in range(k + 1, 7):
        shutil.rmtree(run / f"step-{step:08d}", ignore_errors=True)
    again = go(run, data, init_from=str(base), tune=vars(LORA), resume="auto")
    for name in ("adapter_model.safetensors", "optim.safetensors"):
        one, two = load_file(again / name), load_file(tuned / name)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_merge_writes_a_model_of_its_own(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(tuned.parent), "--out", str(tmp_path / "one")]) == 0
    ids = tokens(2, 7, vocab=20)
    with torch.no_grad():
        ours, theirs = (open_model(at)(ids)["logits"] for at in (tmp_path / "one", tuned))
    assert torch.equal(ours, theirs)
    assert load_trained(tmp_path / "one", "cpu").tokenizer.vocab_size
    assert main(["merge", str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 2
    assert "no adapter: there is nothing to merge" in capsys.readouterr().err
    assert main(["merge", str(tuned), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = load_model(tmp_path / "half", "cpu")[0].state_dict()
    whole = open_model(tmp_path / "one").state_dict()
    assert all(torch.equal(half[n], whole[n].bfloat16()) for n in whole)


def test_another_base_is_refused_with_both_hashes(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base.parents[1], tmp_path / "runs")
    adapter, other = tmp_path / "runs/tuned/step-00000006", tmp_path / "other"
    GPT2Model(open_model(base).config).save_pretrained(other)
    code = main(["merge", str(adapter), "--base", str(other), "--out", str(tmp_path / "x")])
    assert code == 2 and not (tmp_path / "x").exists()
    told = capsys.readouterr().err
    assert json.loads((adapter / "base.json").read_text())["sha256"][:16] in told
    assert f"{other} has " in told


@pytest.mark.parametrize(
    "words",
    [["merge", "{}", "--out", "x"], ["chat", "{}"], ["serve", "{}", "--port", "0"],
     ["generate", "{}", "--prompt", "a"], ["eval", "{}"],
     ["finetune", "{}", "data", "--out", "x"], ["export", "{}", "--to", "hf", "--out", "x"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_command_refuses_another_base_naming_both_hashes(
    words: list[str], base: Path, tuned: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """原模型的文件夹还在，里面换了权重：base.json 的 sha256 认得出。"""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    shutil.copytree(tuned, "runs/step-00000006")
    shutil.copytree(data, "data")
    adapter = Path("runs/step-00000006")
    said = json.loads((adapter / "base.json").read_text())
    moved = said | {"path": str(tmp_path / "base"), "relative": "../../base"}
    (adapter / "base.json").write_text(json.dumps(moved))
    (adapter / "manifest.json").unlink()
    shutil.move(adapter, "adapter")
    GPT2Model(open_model(base).config).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", "base/model.safetensors")
    assert main([word.format("adapter") for word in words]) == 2
    told = capsys.readouterr().err
    now = sha256_file(tmp_path / "base/model.safetensors")[:16]
    assert said["sha256"][:16] in told and now in told and said["sha256"][:16] != now
    assert not Path("x").exists()


def test_a_base_that_moved_is_looked_for_beside_and_then_asked_for(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base.parents[1], tmp_path / "runs")
    adapter = tmp_path / "runs/tuned/step-00000006"
    said = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps(said | {"path": "/nowhere"}))
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    (alone / "manifest.json").unlink()
    with pytest.raises(ValueError, match="does not match its sha256|bytes"):
        load_model(adapter, "cpu")
    (adapter / "manifest.json").unlink()
    load_model(shutil.move(adapter, adapter.with_name("adapter")), "cpu")
    assert main(["merge", str(alone), "--out", str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err
    assert "is not in /nowhere and " in told and f"gpt2 merge {alone} --base FOLDER" in told
    assert main(["merge", str(alone), "--base", str(base), "--out", str(tmp_path / "x")]) == 0


def test_the_context_shrinks_and_never_grows(base: Path, data: Path, tmp_path: Path) -> None:
    shape = json.loads((base / "config.json").read_text())
    told: list[str] = []
    done = go(tmp_path / "short", data, init_from=str(base), tune=vars(LORA), told=told,
              model=shape | {"context_size": 6})  # fmt: skip
    assert any("the context is 6 of the 8 tokens it had" in line for line in told)
    short = open_model(done)
    assert short.config.context_size == 6
    assert torch.equal(short.embed.wpe.weight, open_model(base).embed.wpe.weight[:6])
    with pytest.raises(ValueError, match="context_size=9 but init_from=.* has 8: a context may"):
        go(tmp_path / "long", data, init_from=str(base), model=shape | {"context_size": 9})


@pytest.mark.parametrize(
    ("trainable", "frozen"), [("last:1", "h.0."), ("head", "h."), ("h.1.*", "embed.")]
)
def test_frozen_weights_stay_over_a_run(
    trainable: str, frozen: str, base: Path, data: Path, tmp_path: Path
) -> None:
    done = go(tmp_path / "run", data, init_from=str(base), tune={"trainable": trainable},
              optim={"lr": 1e-2, "weight_decay": 0.5})  # fmt: skip
    before, after = (load_file(at / "model.safetensors") for at in (base, done))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(frozen)} <= same
    assert same != set(before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_from": None}, "tune.trainable=lora but init_from=None"),
        ({"parallel": {"shard": 2}}, r"with parallel\.shard=2: what is frozen is not divided"),
        ({"optim": {"name": "muon"}}, "optim.name=muon: Muon makes whole matrices"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    changes: dict[str, Any], match: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        go(tmp_path / "run", data, **{"init_from": str(base), "tune": vars(LORA)} | changes)
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_an_adapter_is_refused(tuned: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first gpt2 merge .* --out NEW, then --init-from NEW"):
        go(tmp_path / "run", data, init_from=str(tuned), tune=vars(LORA))


@pytest.mark.slow
def test_the_sum_can_be_trained_whole(tuned: Path, data: Path, tmp_path: Path) -> None:
    whole = go(tmp_path / "all", data, init_from=str(tuned), steps=3)
    assert (whole / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"compile": "on"}, {"activation_checkpointing": 1}, {"micro_batch": 1}]
)
def test_compiled_recomputed_and_cut_it_is_the_same_run(
    changes: dict[str, Any], base: Path, tuned: Path, data: Path, tmp_path: Path
) -> None:
    shape = json.loads((base / "config.json").read_text()) | {"dropout": 0.0}
    more = {"init_from": str(base), "tune": vars(LORA), "model": shape}
    one = load_file(go(tmp_path / "one", data, **more) / "adapter_model.safetensors")
    two = load_file(go(tmp_path / "two", data, **more, **changes) / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-4) for n in one)


@pytest.mark.slow
def test_copies_train_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    words = [
        "train", "--init-from", str(base), "--data.folder", str(data), "--tune.trainable", "lora",
        "--steps", "4", "--schedule.warmup-steps", "1", "--batch-size", "4", "--micro-batch", "1",
        "--eval-every", "0", "--sample-tokens", "0", "--device", "cpu",
    ]  # fmt: skip
    for ranks in ("1", "2"):
        assert main([*words, "--ranks", ranks, "--out", str(tmp_path / ranks)]) == 0
    one, two = (tmp_path / r / "step-00000004/adapter_model.safetensors" for r in "12")
    assert one.read_bytes() == two.read_bytes()

"""`gpt2 upcycle` 与 `gpt2 experts`：写下的就是说的，接着能训练；每个错误一句话，退出码 2。"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from app.cli.main import main
from app.data.chat.template import builtin, find_template
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.tokenizers import load_tokenizer
from app.evaluation.perplexity import open_dataset, score_windows, summarize
from app.evaluation.routing import expert_load
from app.models.transformer import GPT2Model, create_gpt2_model
from app.training.saving.checkpoint import list_steps

WORDS = "the cat sat on a mat and then ran to the other cat\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(WORDS * 60)
    spec = TokenizerSpec("chars")
    source = Sources((folder / "a.txt",))
    prepare(source, folder / "set", spec, val_fraction=0.2, say=lambda line: None)
    return folder / "set"


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """一个模型文件夹，旁边有训练留下的 run.yaml。"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "dense"
    tokenizer = load_tokenizer(data / "train")
    model = create_gpt2_model(
        vocab_size=tokenizer.vocab_size, context_size=16, n_layer=2, n_head=2, n_embed=16,
        norm="pre", dropout=0.0,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save(folder)
    run = {
        "data": {"folder": str(data)}, "steps": 4, "batch_size": 4, "precision": "float32",
        "schedule": {"warmup_steps": 1}, "eval_every": 0, "sample_tokens": 0, "save_every": 0,
        "device": "cpu",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def gpt2(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def loss(folder: Path, data: Path) -> float:
    model, tokenizer = GPT2Model.from_pretrained(folder), load_tokenizer(folder)
    source = open_dataset(data, tokenizer).source
    found = score_windows(model, tokenizer, source, stride=8, batch_size=8)
    value = summarize([s for batch in found for s in batch]).metrics()["nats per token"].value
    assert value is not None
    return value


def test_upcycled_equals_the_dense_model_and_trains_on(dense, tmp_path, capsys):
    out = tmp_path / "up"
    code, text, err = gpt2(capsys, "upcycle", dense, "--experts", 4, "--out", out)
    assert (code, err) == (0, "")
    found = dict(re.findall(r"  (float\d\d)  (\S+)  \(largest", text))
    assert float(found["float32"]) < 1e-6 and float(found["float64"]) < 1e-12
    one, other = GPT2Model.from_pretrained(dense), GPT2Model.from_pretrained(out)
    assert f"{one.num_parameters():,} -> {other.num_parameters():,} parameters" in text
    assert other.config.moe_num_experts == 4 and other.config.moe_layers == (0, 1)
    assert other.config.expert_hidden == one.config.mlp_hidden
    assert sorted(p.name for p in tmp_path.iterdir()) == ["up"]
    run = tmp_path / "run"
    code, text, _ = gpt2(capsys, "train", "--config", out / "train.yaml", "--out", run)
    assert code == 0 and f"weights from {out}" in text
    trained = GPT2Model.from_pretrained(list_steps(run)[-1][1])
    assert trained.config == other.config
    moved = trained.h["0"].mlp.experts.c_fc.weight - other.h["0"].mlp.experts.c_fc.weight
    # 四步、学习率 1e-3：从那里出发的权重走不远，随机的初值则差得多。
    assert 0 < float(moved.detach().abs().max()) < 0.02


def test_noise_layers_and_router_are_told(dense, tmp_path, capsys):
    out = tmp_path / "up"
    argv = ["--experts", 3, "--layers", 1, "--noise", 0.1, "--router", "sigmoid", "--out", out]
    code, text, _ = gpt2(capsys, "upcycle", dense, *argv)
    config = GPT2Model.from_pretrained(out).config
    assert code == 0 and config.moe_layers == (1,) and config.moe.router == "sigmoid"
    assert "noise 0.1 is in it" in text and "1 of 2 layers with 3 experts, top-2" in text
    assert float(re.findall(r"float64  (\S+)", text)[0]) > 1e-4


def test_average_and_prune_report_the_loss(dense, data, tmp_path, capsys):
    up, mean, fewer = tmp_path / "up", tmp_path / "mean", tmp_path / "fewer"
    chatty = shutil.copytree(dense, tmp_path / "chatty")
    builtin("plain", load_tokenizer(dense)).save(chatty)
    gpt2(capsys, "upcycle", chatty, "--experts", 6, "--noise", 0.3, "--seed", 1, "--out", up)
    code, text, _ = gpt2(capsys, "experts", up, "--average", "--out", mean, "--data", data)
    assert code == 0 and not GPT2Model.from_pretrained(mean).config.moe_num_experts
    before, after = loss(up, data), loss(mean, data)
    assert f"{before:.4f} -> {after:.4f} ({after - before:+.4f}) nats per token" in text
    code, text, _ = gpt2(
        capsys, "experts", up, "--prune", "--keep", 3, "--out", fewer, "--data", data
    )
    assert code == 0 and "3 of 6 experts kept" in text and text.count("kept") == 3
    after = loss(fewer, data)
    assert f"{before:.4f} -> {after:.4f} ({after - before:+.4f})" in text
    assert GPT2Model.from_pretrained(fewer).config.moe_num_experts == 3
    # 会答话的模型仍会答话
    assert find_template(chatty) == find_template(up) == find_template(mean) == find_template(fewer)


def test_the_load_counts_every_token_once(dense, data, tmp_path, capsys):
    up = tmp_path / "up"
    gpt2(capsys, "upcycle", dense, "--experts", 4, "--out", up)
    model, tokenizer = GPT2Model.from_pretrained(up), load_tokenizer(up)
    source = open_dataset(data, tokenizer).source
    seen: list[int] = []
    one, four = (
        expert_load(model, tokenizer.document_separator, source, batch, seen.append)
        for batch in (1, 4)
    )
    assert torch.equal(one, four) and sum(seen) == 2 * source.n_tokens
    assert one.sum(1).tolist() == [2 * (source.n_tokens + 1)] * 2


def test_pruning_nothing_is_refused(dense, data, tmp_path, capsys):
    up, out = tmp_path / "up", tmp_path / "out"
    gpt2(capsys, "upcycle", dense, "--experts", 2, "--out", up)
    code, _, err = gpt2(capsys, "experts", up, "--prune", "--data", data, "--out", out)
    assert code == 2 and "all 2 experts are in use" in err and not out.exists()


@pytest.mark.parametrize("argv, words", [
    (["upcycle", "DENSE", "--top-k", 9], "moe_top_k=9 is above moe_num_experts=8"),
    (["upcycle", "DENSE", "--experts", 1], "moe_num_experts=1 must be between 2"),
    (["upcycle", "DENSE", "--top-k", 1], "moe_top_k=1"),
    (["upcycle", "DENSE", "--layers", 5], r"layers go from 0 to 1"),
    (["upcycle", "DENSE", "--noise", "-1"], "noise=-1.0"),
    (["upcycle", "nowhere"], "nowhere does not exist"),
    (["experts", "DENSE", "--average"], "moe_num_experts=0"),
    (["experts", "DENSE"], "neither --average nor --prune"),
    (["experts", "DENSE", "--average", "--prune"], "both --average and --prune"),
    (["experts", "DENSE", "--average", "--keep", 3], "keep=3 has no effect"),
])  # fmt: skip
def test_errors_leave_nothing_behind(argv, words, dense, tmp_path, capsys):
    argv = [dense if word == "DENSE" else word for word in argv]
    code, out, err = gpt2(capsys, *argv, "--out", tmp_path / "out")
    assert code == 2 and out == "" and re.search(words, err)
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_upcycled_twice(dense, tmp_path, capsys):
    up = tmp_path / "up"
    gpt2(capsys, "upcycle", dense, "--out", up)
    code, _, err = gpt2(capsys, "upcycle", dense, "--out", up)
    assert code == 2 and f"out={up} already exists" in err
    code, _, err = gpt2(capsys, "upcycle", up, "--out", tmp_path / "twice")
    assert code == 2 and "already has moe_num_experts=8" in err


def test_a_copy_that_computes_something_else_is_exit_code_1(dense, tmp_path, capsys, monkeypatch):
    from app.models.transformer.experts import upcycle

    real = upcycle.upcycle

    def wrong(state, *args, **options):
        found = real(state, *args, **options)
        name = next(name for name in found if name.endswith("experts.c_fc.weight"))
        return {**found, name: found[name] * 1.001}

    monkeypatch.setattr(upcycle, "upcycle", wrong)
    code, text, err = gpt2(capsys, "upcycle", dense, "--out", tmp_path / "up")
    assert code == 1 and "must compute the same" in err and "train on with" not in text

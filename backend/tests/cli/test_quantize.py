"""`gpt2 quantize`：写下的能像别的模型一样用，说的数对，每个错误一句话，退出码 2，什么也没写。"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from app.cli.main import main
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.tokenizers import load_tokenizer
from app.models.transformer import GPT2Model, create_gpt2_model
from app.quantization.model import QuantizedModel

WORDS = "the cat sat on a mat and then ran to the other cat\n"


def prepared(folder: Path, text: str) -> Path:
    (folder / "a.txt").write_text(text)
    prepare(
        Sources((folder / "a.txt",)), folder / "set", TokenizerSpec("chars"), val_fraction=0.2,
        say=lambda line: None,
    )  # fmt: skip
    return folder / "set"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"), WORDS * 60)


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """一个模型文件夹，旁边有训练留下的 run.yaml。"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    tokenizer = load_tokenizer(data / "train")
    model = create_gpt2_model(
        vocab_size=tokenizer.vocab_size, context_size=16, n_layer=2, n_head=2, n_embed=32,
        norm="pre", dropout=0.0,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump({"data": {"folder": str(data)}}))
    return folder


@pytest.fixture(scope="module")
def int8(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "int8"
    assert main(["quantize", str(run_folder), "--to", "int8", "--out", str(out), SLOW]) == 0
    return out


# 这么小的模型多半不会变快。
SLOW = "--allow-slower"


def gpt2(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("options", "described"),
    [
        (["--to", "fp16"], "fp16 x9; rtn"),
        (["--to", "int8"], "int8 x9; rtn"),
        (["--to", "int4"], "int8 x1, int4 g32 x8; rtn"),
        (["--to", "int4", "--method", "gptq", "--asymmetric", "--group", "16"],
         "int8 x1, int4 g16 asymmetric x8; gptq"),
        (["--to", "int4", "--head-bits", "4"], "int4 g32 x9; rtn"),
    ],
)  # fmt: skip
def test_it_writes_what_it_says(options, described, run_folder, tmp_path, capsys):
    out = tmp_path / "small"
    code, text, err = gpt2(capsys, "quantize", run_folder, *options, "--out", out, SLOW)
    assert (code, [line for line in err.splitlines() if "note" not in line]) == (0, [])
    made = GPT2Model.from_pretrained(out)
    assert isinstance(made, QuantizedModel) and made.describe() == described
    assert described in text and f"{made.nbytes():,} bytes" in text
    assert re.search(r"KL \d\.\d\de-\d\d nats, likeliest token changed at \d+\.\d\d%", text)
    assert re.search(r"perplexity [\d.]+ -> [\d.]+ \([+-][\d.]+%, ± [\d.]+%\)", text)
    assert re.search(r"speed    [\d,.]+ -> [\d,.]+ tokens/s", text)
    assert ("head     4 bits alone cost KL" in text) is ("--head-bits" in options)
    assert ("calibrated on" in text) is ("gptq" in options)
    assert load_tokenizer(out).fingerprint() == load_tokenizer(run_folder).fingerprint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_the_budget_is_met_and_spent_on_the_sensitive(run_folder, tmp_path, capsys):
    out = tmp_path / "mixed"
    argv = ("quantize", run_folder, "--to", "int4", "--budget", "0.27", "--out", out, SLOW)
    code, text, _ = gpt2(capsys, *argv)
    made = GPT2Model.from_pretrained(out)
    kept = [n for n, s in made.schemes.items() if s.bits == 8 and n.startswith("h.")]
    assert code == 0 and f"{len(kept)} of 8 matrices keep 8 bits" in text and 0 < len(kept) < 8
    assert made.nbytes() <= 0.27 * 4 * made.num_parameters()


def test_slower_is_an_error_and_nothing_is_written(run_folder, tmp_path, capsys, monkeypatch):
    slow = "app.generation.speed.decode_speed"
    monkeypatch.setattr(slow, lambda models, rounds: [9.0, 8.0])
    out = tmp_path / "small"
    code, text, err = gpt2(capsys, "quantize", run_folder, "--to", "int8", "--out", out)
    assert code == 1 and "--allow-slower" in err and "9.0 -> 8.0 tokens/s" in text
    assert not list(tmp_path.iterdir())
    assert gpt2(capsys, "quantize", run_folder, "--to", "int8", "--out", out, SLOW)[0] == 0


def test_without_data_it_compares_on_random_tokens_and_says_so(run_folder, tmp_path, capsys):
    alone = tmp_path / "alone"
    GPT2Model.from_pretrained(run_folder).save_pretrained(alone)
    load_tokenizer(run_folder).save(alone)
    argv = ("quantize", alone, "--to", "int8", "--out", tmp_path / "out", SLOW)
    code, text, _ = gpt2(capsys, *argv)
    assert code == 0 and "random tokens" in text and "perplexity" not in text


def test_the_folder_opens_like_any_other(int8, data, tmp_path, capsys):
    code, text, _ = gpt2(capsys, "generate", int8, "--prompt", "the cat", "--max-new-tokens", 4)
    assert code == 0 and text
    facts = tmp_path / "facts.json"
    code, text, _ = gpt2(capsys, "eval", int8, "--data", data, "--json", facts)
    assert code == 0 and "int8 x9; rtn" in text
    floats = GPT2Model.from_pretrained(int8)
    assert json.loads(facts.read_text())["model"]["parameters"] == floats.num_parameters()
    assert gpt2(capsys, "plan", "--config", int8 / "config.json")[0] == 0
    code, text, _ = gpt2(capsys, "verify", "--config", int8 / "config.json")
    assert code == 0 and "kernel" not in text


def test_verify_quantized_runs_the_kernels(capsys):
    code, text, _ = gpt2(capsys, "verify", "--quantized")
    assert code == 0 and all(f"{bits}-bit dequantize: ok" in text for bits in (16, 8, 4))


ERRORS = {
    "group that does not divide": (
        ["--to", "int4", "--group", "48"], "group=48 does not divide the width 32.*16 or 32",
    ),
    "group for int8": (["--to", "int8", "--group", "32"], "group=32 is for --to int4"),
    "budget for fp16": (["--to", "fp16", "--budget", "0.3"], "budget=0.3 is for --to int4"),
    "gptq for fp16": (["--to", "fp16", "--method", "gptq"], "fp16 has nothing to correct"),
    "budget out of range": (["--to", "int4", "--budget", "22"], "budget=22 must be between"),
    "budget too small": (
        ["--to", "int4", "--budget", "0.1"], r"budget=0\.1 cannot be met: .* use --budget 0\.\d+",
    ),
    "no dataset": (["--to", "int8", "--data", "nowhere"], "nowhere.* is not a prepared dataset"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_options(case, run_folder, tmp_path, capsys):
    options, message = ERRORS[case]
    code, _, err = gpt2(capsys, "quantize", run_folder, *options, "--out", tmp_path / "x", SLOW)
    assert code == 2 and re.search(message, err)
    assert not list(tmp_path.iterdir())


def test_calibration_data_must_fit(run_folder, int8, data, tmp_path, capsys):
    def refused(model: Path, *options: object) -> str:
        argv = ("quantize", model, "--to", "int4", "--out", tmp_path / "x", *options, SLOW)
        code, _, err = gpt2(capsys, *argv)
        assert code == 2 and not (tmp_path / "x").exists()
        return err

    (tmp_path / "other").mkdir()
    other = prepared(tmp_path / "other", "completely different alphabet! 0123456789\n" * 40)
    assert "was written with the tokenizer" in refused(run_folder, "--data", other)
    alone = tmp_path / "alone"
    GPT2Model.from_pretrained(run_folder).save_pretrained(alone)
    load_tokenizer(run_folder).save(alone)
    assert "give --data" in refused(alone, "--method", "gptq")
    assert "quantized already (int8 x9; rtn)" in refused(int8)
    (tmp_path / "short").mkdir()
    config = GPT2Model.from_pretrained(run_folder).config.replace(context_size=4000)
    GPT2Model(config).save_pretrained(alone)
    short = prepared(tmp_path / "short", WORDS * 4)
    assert "fewer than one window of 257" in refused(alone, "--method", "gptq", "--data", short)


def test_float_work_from_it_is_refused(int8, data, tmp_path, capsys):
    def refused(*argv: object) -> str:
        code, _, err = gpt2(capsys, *argv)
        assert code == 2
        return err

    assert "upcycling needs float weights" in refused("upcycle", int8, "--out", tmp_path / "up")
    argv = ("--out", tmp_path / "run", "--init-from", int8, "--data.folder", data, "--steps", 2,
            "--schedule.warmup-steps", 1)  # fmt: skip
    config = GPT2Model.from_pretrained(int8).config
    shape = ("--model.n-layer", 2, "--model.n-head", 2, "--model.n-embed", 32,
             "--model.context-size", 16, "--model.norm", config.norm)  # fmt: skip
    assert "needs float weights" in refused("train", *argv, *shape, "--device", "cpu")

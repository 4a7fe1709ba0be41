"""`gpt2 eval`：屏幕与 JSON 上的数就是算出的数；打断后的部分结果如实；每个错误一句话。"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from app.cli.main import main
from app.common import files, progress
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.shards import TokenDataset
from app.data.tokenizers import ByteTokenizer, load_tokenizer
from app.evaluation import perplexity, tasks
from app.evaluation.perplexity import open_text, score_windows, summarize
from app.models.transformer import GPT2Model, create_gpt2_model
from app.training.report.run_facts import Facts, write_facts
from app.training.saving import checkpoint
from app.training.saving.checkpoint import write_checkpoint

TEXT = "ROMEO: but söft, what light through yonder window breaks?\n" * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    model = create_gpt2_model(vocab_size=260, context_size=32, n_layer=2, n_head=2, n_embed=16)
    with torch.no_grad():
        model.embed.wte.weight.mul_(30)
    model.save_pretrained(place)
    ByteTokenizer().save(place)
    return str(place)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return str(path)


@pytest.fixture
def choices(tmp_path):
    path = tmp_path / "mc.jsonl"
    records = [{"prompt": "a" * n, "choices": ["b", "cc"], "answer": n % 2} for n in range(1, 41)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def gpt2(capsys, *argv):
    code = main(["eval", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def expected(folder, text, stride, count=None):
    model, tokenizer = GPT2Model.from_pretrained(folder), load_tokenizer(folder)
    source = open_text(text, tokenizer).source
    found = score_windows(model, tokenizer, source, stride=stride, batch_size=8)
    return summarize([score for batch in found for score in batch][:count])


def test_the_screen_and_the_json_say_the_same(folder, text, choices, tmp_path, capsys):
    file = tmp_path / "facts.json"
    argv = [folder, "--text", text, "--stride", "5", "--task", choices, "--json", str(file)]
    code, out, err = gpt2(capsys, *argv)
    assert (code, err) == (0, "")
    wanted = expected(folder, Path(text), 5)
    size = len(TEXT.encode())
    assert f"{text}: {size} tokens, {size} bytes, {wanted.windows} windows, stride 5" in out
    assert f"{choices}: multiple choice, 40 items, 10 cut on the left to fit the context" in out
    data = json.loads(file.read_text())
    first, second = data["results"]
    assert data["partial"] is False and first["complete"] and second["complete"]
    assert first["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert first["nats"] == pytest.approx(wanted.nats, rel=1e-6)
    assert (first["tokens"], first["bytes"], first["stride"]) == (size, size, 5)
    assert first["windows"] == first["windows_total"] == wanted.windows
    assert first["metrics"]["bits per byte"]["value"] == pytest.approx(
        wanted.nats / math.log(2) / size, rel=1e-6
    )
    for result in data["results"]:
        for name, metric in result["metrics"].items():
            (line,) = [line for line in out.splitlines() if line.startswith(f"  {name}  ")]
            assert f"{metric['value']:,.4f}" in line
            assert (f"± {metric['stderr']:,.4f}" in line) if metric["stderr"] else "±" not in line
    weights = Path(folder, "model.safetensors").read_bytes()
    assert data["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert data["model"]["config"]["context_size"] == 32
    assert data["versions"]["torch"] == torch.__version__


def test_by_default_half_a_context_and_no_task(folder, text, capsys):
    code, out, _ = gpt2(capsys, folder, "--text", text)
    assert code == 0 and "stride 16" in out and "choice" not in out


def test_only_a_task(folder, choices, capsys):
    code, out, _ = gpt2(capsys, folder, "--task", choices, "--task", choices)
    assert code == 0 and out.count("acc_norm") == 2 and "perplexity" not in out


def test_the_data_of_the_run_is_the_default(folder, text, tmp_path, capsys):
    run = tmp_path / "run"
    GPT2Model.from_pretrained(folder).save_pretrained(run)
    ByteTokenizer().save(run)
    code, out, err = gpt2(capsys, str(run))
    assert (code, out) == (2, "") and "give --data, --text or --task" in err
    prepare(Sources([text]), tmp_path / "data", TokenizerSpec("bytes"), val_fraction=0.3)
    capsys.readouterr()
    facts = {"data": {"folder": str(tmp_path / "data")}}
    (run / "run.yaml").write_text(yaml.safe_dump(facts))
    code, out, err = gpt2(capsys, str(run))
    assert code == 0 and f"{tmp_path / 'data' / 'val'}: " in out
    note = f"note: scoring the data of the run, {tmp_path / 'data'} (from {run}/run.yaml)"
    unknown = "; its fingerprint was not kept, so it may have been prepared anew since\n"
    assert err == note + unknown
    assert (
        gpt2(capsys, folder, "--data", str(tmp_path / "data"))[1].split("\n", 1)[1]
        == (out.split("\n", 1)[1])
    )


def prepared(tmp_path, name, text, tokenizer="bytes"):
    (tmp_path / f"{name}.txt").write_text(text)
    source = Sources([tmp_path / f"{name}.txt"])
    prepare(source, tmp_path / name, TokenizerSpec(tokenizer), val_fraction=0.3)
    return tmp_path / name


def facts_of(data):
    parts = [TokenDataset.open(data / part).fingerprint for part in ("train", "val")]
    return Facts(
        decisions=[], notes=[], data=(parts[0], parts[1]), parameters=1, steps=1, expected_loss=5.0
    )


def test_data_prepared_anew_is_not_the_data_of_the_run(folder, tmp_path, capsys):
    run = tmp_path / "run"
    GPT2Model.from_pretrained(folder).save_pretrained(run)
    ByteTokenizer().save(run)
    data = prepared(tmp_path, "data", TEXT)
    (run / "run.yaml").write_text(yaml.safe_dump({"data": {"folder": str(data)}}))
    write_facts(run, facts_of(data))
    capsys.readouterr()
    code, _, err = gpt2(capsys, str(run))
    note = f"note: scoring the data of the run, {data} (from {run / 'run.yaml'})\n"
    assert (code, err) == (0, note)
    # 微调的训练有几个验证集，指纹以空格隔开
    facts = facts_of(data)
    write_facts(run, replace(facts, data=(facts.data[0], f"{facts.data[1]} {'0' * 64}")))
    assert gpt2(capsys, str(run))[0] == 0
    old = TokenDataset.open(data / "train").fingerprint
    shutil.rmtree(data)
    prepared(tmp_path, "data", TEXT.upper())
    capsys.readouterr()
    code, out, err = gpt2(capsys, str(run))
    new = TokenDataset.open(data / "train").fingerprint
    assert (code, out) == (2, "")
    assert f"{data / 'train'} is not the data of the run any more: it holds {new[:12]}" in err
    assert f"{run} was trained with {old[:12]}" in err
    assert gpt2(capsys, str(run), "--data", str(data))[0] == 0


def test_a_validation_part_of_another_tokenizer_is_refused(folder, text, tmp_path, capsys):
    data, other = prepared(tmp_path, "a", TEXT), prepared(tmp_path, "b", TEXT, "chars")
    shutil.rmtree(data / "train")
    shutil.copytree(other / "train", data / "train")
    capsys.readouterr()
    code, out, err = gpt2(capsys, folder, "--data", str(data))
    assert (code, out) == (2, "") and "they do not belong together" in err
    assert str(data / "val") in err and str(data / "train") in err


def test_the_key_of_the_text(folder, text, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"body": "one two"}) + "\n")
    code, _, err = gpt2(capsys, folder, "--text", str(file))
    assert code == 2 and "no key 'text' (keys: 'body'): choose with --text-key" in err
    code, out, _ = gpt2(capsys, folder, "--text", str(file), "--text-key", "body")
    assert code == 0 and f"{file}: 7 tokens" in out
    for argv, message in (
        (["--text", text], "is for .jsonl, .ndjson, .parquet, .json, .csv, .tsv files"),
        (["--data", "x"], "text_key='body' is for --text, which is not given"),
    ):
        code, out, err = gpt2(capsys, folder, *argv, "--text-key", "body")
        assert (code, out) == (2, "") and message in err


def test_a_checkpoint_is_hashed_once(folder, text, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def fill(place):
        GPT2Model.from_pretrained(folder).save_pretrained(place)
        ByteTokenizer().save(place)

    step = write_checkpoint(run, 3, fill)
    seen = []
    real = checkpoint.sha256_file
    for module in (checkpoint, files):
        monkeypatch.setattr(module, "sha256_file", lambda path: seen.append(path) or real(path))
    file = tmp_path / "facts.json"
    assert gpt2(capsys, str(run), "--text", text, "--json", str(file))[0] == 0
    weights = step / "model.safetensors"
    assert seen.count(weights) == 1
    assert json.loads(file.read_text())["model"]["sha256"] == real(weights)


def test_the_json_is_there_when_the_reader_of_the_screen_leaves(
    folder, text, tmp_path, capsys, monkeypatch
):
    """`gpt2 eval --json F | head -1`：没有说完不算成功，而文件已经写好。"""
    reader, writer = os.pipe()
    os.close(reader)
    file = tmp_path / "facts.json"
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code = main(["eval", folder, "--text", text, "--json", str(file)])
    assert code == 141
    assert json.loads(file.read_text())["results"][0]["complete"]


def stop_after(monkeypatch, module, calls):
    real, seen = module.score_rows, []

    def score_rows(*args):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "score_rows", score_rows)


def test_ctrl_c_tells_what_is_done(folder, text, choices, tmp_path, capsys, monkeypatch):
    wanted = expected(folder, Path(text), 5, 8)
    stop_after(monkeypatch, perplexity, 2)
    file = tmp_path / "facts.json"
    argv = ["--text", text, "--stride", "5", "--batch-size", "4", "--task", choices]
    code, out, err = gpt2(capsys, folder, *argv, "--json", str(file))
    assert code == 130 and "interrupted: what follows is partial" in err
    done, total = wanted.tokens, len(TEXT.encode())
    assert f"{text}: partial, the first {done} tokens of {total}" in out and choices not in out
    data = json.loads(file.read_text())
    (result,) = data["results"]
    assert data["partial"] and not result["complete"]
    assert (result["windows"], result["windows_total"]) == (8, 1 + math.ceil((total - 32) / 5))
    assert result["nats"] == pytest.approx(wanted.nats, rel=1e-6)


def test_ctrl_c_in_a_task_keeps_whole_items(folder, text, choices, capsys, monkeypatch):
    stop_after(monkeypatch, tasks, 9)
    argv = ["--text", text, "--task", choices, "--batch-size", "2"]
    code, out, _ = gpt2(capsys, folder, *argv)
    assert code == 130
    assert f"{text}: {len(TEXT.encode())} tokens" in out
    assert "multiple choice, partial, the first 8 items of 40" in out


def test_ctrl_c_before_anything_is_done(folder, text, capsys, monkeypatch):
    stop_after(monkeypatch, perplexity, 0)
    code, out, _ = gpt2(capsys, folder, "--text", text)
    assert code == 130 and "perplexity" not in out


@pytest.mark.parametrize(
    "message, argv",
    [
        ("data=a and text=b are both given", ["--data", "a", "--text", "b"]),
        ("stride=33 must be between 1 and context_size=32", ["--text", "TEXT", "--stride", "33"]),
        ("stride=0", ["--text", "TEXT", "--stride", "0"]),
        ("batch_size=0", ["--text", "TEXT", "--batch-size", "0"]),
        ("nowhere.txt", ["--text", "nowhere.txt"]),
        ("data=nowhere is not a prepared dataset", ["--data", "nowhere"]),
        ("task=nowhere is not a file", ["--task", "nowhere"]),
        ("already exists and is never overwritten", ["--text", "TEXT", "--json", "TEXT"]),
        ("the folder no/where does not exist", ["--text", "TEXT", "--json", "no/where/x.json"]),
        ("device='toaster'", ["--text", "TEXT", "--device", "toaster"]),
        ("line 1: neither 'text'", ["--task", "BAD"]),
    ],
)
def test_wrong_use_is_one_sentence(folder, text, tmp_path, capsys, message, argv):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"x": 1}\n')
    argv = [{"TEXT": text, "BAD": str(bad)}.get(word, word) for word in argv]
    code, out, err = gpt2(capsys, folder, *argv)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("error: ") and len(err.splitlines()) == 1
    with open(text, "rb") as file:
        assert file.read() == TEXT.encode()


def test_what_is_infinite_is_null_in_the_json(folder, text, tmp_path, capsys, monkeypatch):
    def score_rows(model, rows, first):
        return [
            tasks.score_rows(model, [row], [at])[0]._replace(nats=np.full(len(row) - at, 1e4))
            for row, at in zip(rows, first, strict=True)
        ]

    monkeypatch.setattr(perplexity, "score_rows", score_rows)
    file = tmp_path / "facts.json"
    code, out, _ = gpt2(capsys, folder, "--text", text, "--json", str(file))
    assert code == 0 and "inf" in out
    assert json.loads(file.read_text())["results"][0]["metrics"]["perplexity"]["value"] is None


def test_progress_lines_and_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with progress.count_tokens("a [b]", 2000) as advance:
        advance(500)
        advance(1500)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("a [b]: 500/2,000 tokens  ")
    assert "tokens/s" in lines[0] and lines[1].endswith("  0s left")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.count_tokens("a [b]", 2000) as advance:
        advance(500)
    assert "a [b]" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys, app.cli.commands.eval\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "from app.cli.main import main\n"
        "try: main(['eval', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "--stride" in done.stdout

"""`gpt2 finetune` ：生的文件一条命令成为会答话的模型；被杀过的与没杀过的相同；拒绝不留痕迹。"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from app.cli.main import main
from app.data.writer import ExampleWriter
from app.training.trainer import Trainer
from tests.finetuning.conftest import FAST, PAIRS

SHORT = ["--epochs", "1"]


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(run.glob("step-*"))[-1] / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = newest(one), newest(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_raw_csv_becomes_a_chatting_model_in_one_command(
    base: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "answers"
    columns = ["--columns", "prompt=question,completion=answer", "--chat", "chatml"]
    assert (
        main(["finetune", str(base), str(table), *columns, "--out", str(run), *FAST, *SHORT]) == 0
    )
    said = capsys.readouterr().out
    for word in ("trained ", "frozen", "tokens scored", "epochs", "memory", "time", "2 new tokens"):
        assert word in said, word
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert settings["epochs"] is None and settings["steps"] > 0 and settings["data"]["pack"]
    assert settings["optim"]["lr"] == 3e-5 and settings["optim"]["weight_decay"] == 0
    assert settings["model"]["vocab_size"] == 264 and settings["model"]["dropout"] == 0
    assert settings["schedule"]["kind"] == "linear" and settings["schedule"]["min_lr_ratio"] == 0
    evals = rows(run, "eval")
    assert evals[0]["step"] == 0 and evals[0]["set"] == "tuned" and "before" in evals[0]["sets"]
    assert rows(run, "answers")[-1]["asked"] >= 1
    report = (run / "report.html").read_text()
    assert (
        "Fine-tuning" in report and "loss on before" in report and "ended by themselves" in report
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("What does aaa like?\n\nhello\n"))
    assert main(["chat", str(run / "best"), "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.mark.slow
def test_lora_keeps_the_base_and_chats(
    base: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "lora"
    words = ["--chat", "chatml", "--trainable", "lora", "--set", "steps=2"]
    assert main(["finetune", str(base), str(questions), "--out", str(run), *words, *FAST]) == 0
    found = sorted(run.glob("step-*"))[-1]
    assert (found / "adapter_model.safetensors").is_file()
    assert not (found / "model.safetensors").exists() and (found / "chat.json").is_file()
    facts = json.loads((run / "facts.json").read_text())
    assert 0 < facts["trained"] < facts["parameters"] / 2
    again = ["finetune", str(run), str(questions), "--trainable", "lora"]
    refused(again, "gpt2 merge", tmp_path / "twice", capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(run), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert main(["compare", str(run), str(base), "--out", str(tmp_path / "c.html")]) == 0
    shown = capsys.readouterr().out
    assert "answers ended" in shown and "tuned data" in shown
    assert f"{facts['trained']:,}" in shown


def test_killed_and_resumed_equals_straight(
    base: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """先在准备数据时按 Ctrl-C，再在训练到一半时死掉；每次都是同一条命令。"""
    words = ["finetune", str(base), str(questions), "--chat", "chatml", *FAST[:4]]
    words += ["--set", "steps=4", "--set", "eval_every=2", "--set", "save_every=2"]
    words += ["--set", "optim.lr=1e-3", "--set", "sample_tokens=0"]
    assert main([*words, "--out", str(tmp_path / "straight")]) == 0
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(ExampleWriter, "finish", lambda self, source: _interrupt())
        assert main([*words, "--out", str(run)]) == 130
    assert (run / "data" / "prepare.json").is_file() and not (run / "run.yaml").exists()
    step = Trainer._train_step

    def dies(self: Trainer) -> None:
        if self.step == 3:
            raise ValueError("killed")
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", dies)
        assert main([*words, "--out", str(run)]) == 2
    assert main([*words, "--out", str(run)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*words, "--out", str(run), "--set", "seed=1", "--resume", "auto"]) == 2
    assert "seed" in capsys.readouterr().err
    assert main([*words, "--out", str(run), "--resume", "auto"]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert same(run, tmp_path / "straight")


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_dry_run_writes_nothing(
    base: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "dry"
    words = ["finetune", str(base), str(questions), "--out", str(run), "--dry-run", *FAST]
    assert main([*words, "--trainable", "last:1", "--context", "80"]) == 0
    said = capsys.readouterr().out
    assert "context 80" in said and "the last 1 of 2 layers" in said and not run.exists()


GOOD = {"prompt": "a", "completion": "b"}
BAD: dict[str, tuple[str, str, list[str], str]] = {
    "an empty answer": (
        "q.jsonl", json.dumps(GOOD) + '\n{"prompt": "x", "completion": " "}\n', [], "line 2",
    ),
    "a ragged csv": ("q.csv", "prompt,completion\na,b\na,b,c\n", [], "row 2"),
    "equal sides": (
        "p.jsonl", json.dumps({"prompt": "x", "chosen": "y", "rejected": "y"}) + "\n", [], "equal",
    ),
    "nothing but answers": (
        "m.jsonl", json.dumps({"messages": [{"role": "assistant", "content": "a"}]}) + "\n",
        ["--val", "0"], "nothing would be masked",
    ),
    "unknown keys": (
        "q.jsonl", '{"question": "x", "answer": "y"}\n', [], "prompt=question,completion=answer",
    ),
    "no such layer": ("t.txt", "text " * 99, ["--trainable", "last:9"], "last:2"),
    "no such tensor": ("t.txt", "text " * 99, ["--trainable", "h.*.attention"], "names no"),
    "a longer context": ("t.txt", "text " * 99, ["--context", "97"], "never grow"),
    "no such setting": ("t.txt", "text " * 99, ["--set", "optim.lrr=1"], "'lr'"),
    "a shape": ("t.txt", "text " * 99, ["--set", "model.n_layer=3"], "comes from MODEL"),
    "a whole section": ("t.txt", "text " * 99, ["--set", "optim={lr: 1e-4}"], "optim.name="),
    "no epoch": ("t.txt", "text " * 99, ["--epochs", "0"], "epochs=0"),
    "old data without a val part": (
        "t.txt", "text " * 99, ["--old-data", "nowhere"], "no validation part",
    ),
    "chat of text": ("t.txt", "text " * 99, ["--chat", "chatml"], "plain text"),
    "a bad fraction": ("t.txt", "text " * 99, ["--val", "1.5"], "below 1"),
    "two lengths": (
        "t.txt", "text " * 99, ["--epochs", "1", "--set", "steps=2"], "both say how long",
    ),
    "new tokens that nothing trains": (
        "q.jsonl", (json.dumps(GOOD) + "\n") * 20, ["--chat", "chatml", "--trainable", "last:1"],
        "new tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text, words, wanted = BAD[name]
    (tmp_path / file).write_text(text)
    refused(["finetune", str(base), str(tmp_path / file), *words], wanted, tmp_path / "run", capsys)


def refused(words: list[str], wanted: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([*words, "--out", str(out), *FAST]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and wanted in errors[0], errors
    assert not out.exists()


def test_other_tokenizers_and_bases_are_refused(
    base: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """教师与数据的分词器、被换过的原模型、改过的模板：都在写下任何东西之前。"""
    words = [str(questions), "--chat", "chatml"]
    distill = ["--set", "objective.kind=distill", "--set", f"objective.teacher={base}"]
    refused(["finetune", str(base), *words, *distill], "tokenizer", tmp_path / "a", capsys)
    (tmp_path / "other.txt").write_text("some other text " * 50)
    data = tmp_path / "chars"
    assert main(["prepare", str(tmp_path / "other.txt"), "--out", str(data), "--tokenizer",
                 "chars"]) == 0  # fmt: skip
    refused(["finetune", str(base), str(data)], "tokenizer", tmp_path / "b", capsys)
    refused(
        ["finetune", str(base), str(data), "--chat", "chatml"], "prepared", tmp_path / "c", capsys
    )
    ready = tmp_path / "ready"
    assert main(["prepare", str(questions), "--out", str(ready), "--tokenizer", str(base)]) == 0
    chat = ready / "train" / "chat.json"
    chat.write_text(chat.read_text().replace('"<|endoftext|>"\n  ]', '"<|nothing|>"\n  ]'))
    refused(["finetune", str(base), str(ready)], "template", tmp_path / "d", capsys)


@pytest.mark.slow
def test_twenty_pairs_are_memorised_and_ended(
    base: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """研究里的试验 12：20 个都一字不差、自己收尾；提问不计分，所以它的困惑度不比全计分时低。"""
    words = ["finetune", str(base), str(questions), "--val", str(questions), "--chat", "chatml"]
    words += [*FAST, "--epochs", "150", "--set", "optim.lr=5e-3", "--set", "batch_size=2"]
    runs = {score: tmp_path / score for score in ("answers", "all")}
    for score, run in runs.items():
        assert main([*words, "--out", str(run), "--set", f"objective.score={score}"]) == 0
    answers = rows(runs["answers"], "answers")[-1]
    assert (answers["asked"], answers["ended"], answers["exact"]) == (20, 20, 20)
    whole = {score: _whole_loss(run) for score, run in runs.items()}
    assert whole["answers"] > whole["all"] + 0.1, whole
    asked = "".join(f"{ask}\n/reset\n" for ask, _ in PAIRS)
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))
    capsys.readouterr()
    assert main(["chat", str(runs["answers"]), "--greedy", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [answer for _, answer in PAIRS]


def _whole_loss(run: Path) -> float:
    """每个词元（提问也算）的损失：蒙住提问的，提问就学不到。"""
    from app.data.feed import open_feed
    from app.data.shards import TokenDataset
    from app.models.transformer import GPT2Model

    model = GPT2Model.from_pretrained(sorted(run.glob("step-*"))[-1]).eval()
    batch = open_feed(TokenDataset.open(run / "data" / "val"), 96, 20, 0, score="all").batch(0)
    assert batch.segments is not None and batch.positions is not None
    with torch.no_grad():
        out = model(
            torch.from_numpy(batch.inputs),
            targets=torch.from_numpy(batch.targets),
            segment_ids=torch.from_numpy(batch.segments),
            positions=torch.from_numpy(batch.positions),
        )
    return float(out["loss"])


def test_plain_text_keeps_the_template_of_a_chat_model(
    base: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """会对话的模型再读几封信：模板留着，说一声；续训之后仍在。"""
    chat, run = tmp_path / "chat", tmp_path / "letters"
    words = ["--set", "steps=1", *FAST]
    assert main(["finetune", str(base), str(questions), "--chat", "chatml", "--out", str(chat),
                 *words]) == 0  # fmt: skip
    letters = tmp_path / "letters.txt"
    letters.write_text("Dear friend, come soon.\n" * 60)
    tune = ["finetune", str(chat), str(letters), "--out", str(run)]
    assert main([*tune, *words]) == 0
    said = capsys.readouterr().out
    assert "the data is plain text, so the chat template chatml of" in said
    (step,) = run.glob("step-*")
    template = (chat / "step-00000001" / "chat.json").read_bytes()
    assert (step / "chat.json").read_bytes() == template
    assert (
        main(["train", "--config", str(run / "run.yaml"), "--resume", "auto", "--steps", "2"]) == 0
    )
    assert (run / "step-00000002" / "chat.json").read_bytes() == template

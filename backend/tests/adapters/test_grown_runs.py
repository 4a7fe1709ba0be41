"""数据有新的特殊词元时的一次训练：词表长到哪里，谁训练，导出读得到（试验 10）。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.adapters.load import open_model
from app.cli.commands import train as command
from app.cli.main import main
from app.data.chat.template import builtin
from app.data.tokenizers import CharTokenizer, Tokenizer, train_bpe
from app.data.writer import ExampleWriter
from app.models.transformer import GPT2Model
from app.models.transformer.config import GPT2Config
from app.training.run import train

SPECIAL = ["<|user|>", "<|end|>"]
TOKENIZER = train_bpe(["to be or not to be, that is the question"], 262)
USED = TOKENIZER.vocab_size


def write(folder: Path, tokenizer: Tokenizer) -> None:
    writer = ExampleWriter(folder / "train", tokenizer, builtin("plain", tokenizer), "chat", 1000)
    user, end = (tokenizer.special_tokens[text] for text in SPECIAL)
    for text in (b"to be", b"or not", b"that is") * 4:
        ids = np.array([user, *text, end], dtype=np.uint32)
        writer.add_example(ids, np.arange(len(ids)) > 2, n_bytes=len(text))
    writer.finish({"description": "test"})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.training.run.plot_losses", lambda run: None)
    write(Path("chats"), TOKENIZER.with_special(SPECIAL))
    return tmp_path


def start(vocabulary: int, tied: bool = True) -> GPT2Model:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=vocabulary, context_size=12, n_layer=1, n_head=2, n_embed=16, norm="pre",
        tie_weights=tied,
    )  # fmt: skip
    model = GPT2Model(shape)
    model.save_pretrained("base")
    TOKENIZER.save("base")
    return model


def tune(*words: str) -> Path:
    args = command.parse([
        "--init-from", "base", "--data.folder", "chats", "--steps", "6", "--eval-every", "0",
        "--schedule.warmup-steps", "0", "--batch-size", "4", "--sample-tokens", "0", "--out", "run",
        "--device", "cpu", "--optim.lr", "0.01", *words,
    ])  # fmt: skip
    return train(args.train, lambda plan: None, lambda line: None).checkpoint


@pytest.mark.parametrize(("vocabulary", "size"), [(USED, 320), (USED + 3, USED + 3)])
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_adapter_holds_the_new_rows_alone(vocabulary: int, size: int, tied: bool) -> None:
    old = start(vocabulary, tied)
    done = tune("--tune.trainable", "lora")
    tensors = load_file(done / "adapter_model.safetensors")
    rows = {n: t for n, t in tensors.items() if n.endswith("trainable_tokens_delta")}
    assert len(rows) == (1 if tied else 2) and all(t.shape == (2, 16) for t in rows.values())
    model = open_model(done)
    assert model.config.vocab_size == size
    now, before = model.embed.wte.weight, old.embed.wte.weight
    assert torch.equal(now[:USED], before[:USED])
    assert torch.equal(now[USED + 2 : vocabulary], before[USED + 2 :])
    assert (now[USED] != now[USED + 1]).any()


@pytest.mark.slow
def test_a_grown_run_resumes_to_the_bit() -> None:
    start(USED)
    straight = load_file(tune("--tune.trainable", "lora") / "adapter_model.safetensors")
    tune("--tune.trainable", "lora", "--save-every", "3", "--out", "again", "--keep-last", "9")
    (step,) = Path("again").glob("step-00000006")
    step.rename("aside")
    again = tune("--config", "again/run.yaml", "--resume", "auto", "--out", "again")
    found = load_file(again / "adapter_model.safetensors")
    assert all(torch.equal(found[n], straight[n]) for n in straight)


@pytest.mark.slow
def test_exports_read_the_new_ids() -> None:
    start(USED)
    done, ids = tune("--tune.trainable", "lora"), torch.tensor([[65, USED, 66, USED + 1]])
    ours = open_model(done)(ids)["logits"]
    assert main(["export", str(done), "--to", "hf", "--out", "hf"]) == 0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32).eval()
    assert (theirs(ids).logits[..., :320] - ours).abs().max() <= 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [USED, USED + 1]
    gguf = pytest.importorskip("gguf")
    assert main(["export", str(done), "--to", "gguf", "--out", "gguf"]) == 0
    (path,) = Path("gguf").glob("*.gguf")
    reader = gguf.GGUFReader(path)
    names = reader.get_field("tokenizer.ggml.tokens")
    texts = [bytes(names.parts[i]).decode() for i in names.data]
    assert texts[USED : USED + 2] == SPECIAL
    (table,) = [t for t in reader.tensors if t.name == "token_embd.weight"]
    stored = torch.tensor(gguf.quants.dequantize(table.data, table.tensor_type))
    wanted = open_model(done).embed.wte.weight
    assert (stored[: len(wanted)] - wanted).abs().max() <= 1e-3


def test_another_tokenizer_and_layers_that_leave_them_alone_are_refused() -> None:
    start(USED)
    with pytest.raises(
        ValueError, match=rf"2 new tokens \({USED}\.\.{USED + 1}\) but tune\.trainable=last:1"
    ):
        tune("--tune.trainable", "last:1")
    meta = json.loads(Path("chats/train/meta.json").read_text())
    assert meta["tokenizer"]["vocab_size"] == USED + 2
    CharTokenizer("abcdefgh").save("base")
    with pytest.raises(ValueError, match="was trained with the tokenizer"):
        tune("--tune.trainable", "lora", "--out", "other")

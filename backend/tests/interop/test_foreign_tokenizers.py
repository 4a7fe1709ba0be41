"""别处的分词器走一圈：导入、生成、导出之后，id、停止处都与 AutoTokenizer 的相同。"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cli.main import main
from app.data.hub_tokenizer import HubTokenizer
from app.data.tokenizers import BPETokenizer, train_bpe
from app.generation.generate import generate
from app.generation.sampling import SamplingConfig
from app.interop.equivalent import Weights
from app.interop.export import export
from app.interop.hf import write_hf
from app.interop.reading.importing import import_model, write_model
from app.interop.tokens import tokenizer_files
from app.models.transformer import GPT2Model

from ..models.helpers import tiny_model

pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
TEXT = "the cat sat on the mat, the rat sat on the cat; naïve 12 and that's that.\n" * 20
BPE = train_bpe([TEXT], 290)
PIECES = ["the", " cat", "newword", "Naïve", " ", "  ", "\n", "é", "中", "😀", "12", "'s", "sat."]


def gpt2_files(folder: Path, **settings: Any) -> Any:
    """GPT2Tokenizer，由两个词表文件造出，再由它自己存下。"""
    from transformers import GPT2Tokenizer

    files = tokenizer_files(BPE, 24)
    (folder / "vocab.json").write_text(files["vocab.json"], encoding="utf-8")
    (folder / "merges.txt").write_text(files["merges.txt"], encoding="utf-8")
    return GPT2Tokenizer.from_pretrained(folder, **settings)


def added(folder: Path) -> None:
    tokenizer = gpt2_files(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "[PAD]"})
    tokenizer.add_tokens(["newword", " cat"])
    tokenizer.save_pretrained(folder)


def prefix_space(folder: Path) -> None:
    gpt2_files(folder, add_prefix_space=True).save_pretrained(folder)


def prefix_space_by_config_alone(folder: Path) -> None:
    gpt2_files(folder)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def legacy_files(folder: Path) -> None:
    """没有 tokenizer.json 的旧文件夹。"""
    gpt2_files(folder)
    size = BPE.vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"newword": size, "<|user|>": size + 1}))
    marks = {"eos_token": "<|user|>", "additional_special_tokens": ["<|user|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def begins_with_bos(folder: Path) -> None:
    """OPT 的样子：文本之前有一个 </s>。"""
    gpt2_files(folder, add_bos_token=True).save_pretrained(folder)


def _saved(folder: Path, hub: Any, **names: str) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=hub, **names).save_pretrained(folder)


def lowercase(folder: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    hub = Tokenizer.from_str(json.dumps(BPE.to_json()))
    hub.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    _saved(folder, hub, eos_token="<|endoftext|>")


def word_piece(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    hub = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    hub.normalizer, hub.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    hub.decoder = decoders.WordPiece()
    names = ["[UNK]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=names, show_progress=False)
    hub.train_from_iterator([TEXT], trainer)
    _saved(folder, hub, unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]")


def unigram(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    hub = Tokenizer(models.Unigram())
    hub.pre_tokenizer, hub.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    hub.train_from_iterator([TEXT], trainer)
    hub.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", hub.token_to_id("<s>"))]
    )
    _saved(folder, hub, unk_token="<unk>", eos_token="</s>", bos_token="<s>")


MAKERS: dict[str, Callable[[Path], None]] = {
    made.__name__: made
    for made in (
        added, prefix_space, prefix_space_by_config_alone, legacy_files, begins_with_bos, lowercase,
        word_piece, unigram,
    )
}  # fmt: skip


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def model_folder(folder: Path, name: str, spare: int = 0) -> GPT2Model:
    """随机的 GPT-2，词表恰好装下分词器，另有 spare 行。"""
    folder.mkdir()
    tokenizers = folder.parent / "tokenizer"
    tokenizers.mkdir()
    MAKERS[name](tokenizers)
    size = max(auto(tokenizers).get_vocab().values()) + 1
    model = tiny_model(torch.float32, norm="pre", vocab_size=size + spare)
    folder.rmdir()
    write_hf(Weights.of(model), "gpt2", None, folder)
    for path in tokenizers.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return model


def strings(count: int) -> list[str]:
    draw = random.Random(0)
    letters = [*PIECES, *"abcxyz ABC.,!?09-\t", "\u200b", "ﬁ", "Å"]
    return ["".join(draw.choices(letters, k=draw.randrange(1, 14))) for _ in range(count)]


def check_ids(ours: Any, theirs: Any, count: int) -> None:
    for text in strings(count):
        wanted = theirs(text, split_special_tokens=True)["input_ids"]
        # 一个词元也没有的提示由我们补上边界。
        assert ours.encode_prompt(text) == (wanted or [ours.boundary_id]), text


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "count", [500, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_ids_after_import_and_after_export(name: str, count: int, tmp_path: Path) -> None:
    model_folder(tmp_path / "hub", name, spare=3)
    found = import_model(str(tmp_path / "hub"))
    assert found.tokenizer is not None, found.why
    check_ids(found.tokenizer, auto(tmp_path / "hub"), count)
    write_model(found, tmp_path / "ours")
    export(found.model, found.tokenizer, "hf", tmp_path / "out")
    theirs, again = auto(tmp_path / "out"), import_model(str(tmp_path / "out"))
    check_ids(found.tokenizer, theirs, 200)
    assert again.tokenizer is not None and again.tokenizer.stop_ids == found.tokenizer.stop_ids
    assert again.model.config == found.model.config
    check_ids(again.tokenizer, theirs, 200)
    assert theirs.eos_token_id == found.tokenizer.document_separator
    rows = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    assert sorted(theirs.get_vocab().values()) == list(range(rows))


def test_added_tokens_are_generated_and_stop(tmp_path: Path) -> None:
    """训练过的、添加的词元会被选中；真正的结束符与 generation_config 里的都停下。"""
    model = model_folder(tmp_path / "hub", "added")
    theirs = auto(tmp_path / "hub")
    end, word = theirs.eos_token_id, theirs.convert_tokens_to_ids("newword")
    assert (end, word) == (BPE.vocab_size, BPE.vocab_size + 2)
    path = tmp_path / "hub" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [end, word, 10_000]}))
    found = import_model(str(tmp_path / "hub"))
    tokenizer = found.tokenizer
    assert isinstance(tokenizer, HubTokenizer)
    assert tokenizer.stop_ids == (end, word) and tokenizer.document_separator == end
    assert tokenizer.encode("newword") == [word] and tokenizer.decode([word]) == "newword"
    assert model.config.vocab_size == tokenizer.vocab_size
    # 贪心总是选 newword：偏置推着它。
    with torch.no_grad():
        found.model.embed.wte.weight.zero_()
        found.model.embed.wte.weight[word] = 1.0
        assert found.model.ln_f is not None
        found.model.ln_f.bias.add_(1.0)
    write_model(found, tmp_path / "ours")
    greedy = SamplingConfig(temperature=0.0)
    (free,) = generate(found.model, [[5]], max_new_tokens=3, sampling=greedy)
    assert free == [word] * 3
    export(found.model, tokenizer, "hf", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [end, word]
    assert settings["pad_token_id"] == theirs.pad_token_id not in settings["suppress_tokens"]
    assert word not in settings["suppress_tokens"]


def test_plain_gpt2_stays_the_fast_kind(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    write_hf(Weights.of(tiny_model(torch.float32, norm="pre", vocab_size=300)), "gpt2", BPE, hub)
    found = import_model(str(hub)).tokenizer
    assert isinstance(found, BPETokenizer) and found.stop_ids == (found.document_separator,)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("added", "eos_token is '<|im_end|>'"),
        ("prefix_space", "add_prefix_space is True"),
        ("word_piece", "eos_token is"),
        ("legacy_files", "special_tokens_map.json: eos_token is '<|user|>'"),
    ],
)
def test_without_transformers_the_weights_come_alone(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path / "hub", name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = import_model(str(tmp_path / "hub"))
    assert torch.equal(found.model.head_weight, model.head_weight)
    assert found.tokenizer is None
    assert reason in found.why and "pip install 'gpt2-workbench[hf]'" in found.why


@pytest.mark.parametrize("damage", ["cut", "nonsense", "huge eos"])
def test_a_broken_tokenizer_does_not_refuse_the_weights(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder(tmp_path / "hub", "added")
    path = tmp_path / "hub" / "tokenizer.json"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nonsense":
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**data, "normalizer": {"type": "No such thing"}}))
    else:
        settings = {"eos_token_id": ["x"]}
        (tmp_path / "hub" / "generation_config.json").write_text(json.dumps(settings))
    assert main(["import", str(tmp_path / "hub"), "--out", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "tokenizer  none (" in out and str(tmp_path / "hub") in out
    assert not (tmp_path / "ours" / "tokenizer.json").exists()
    # 点名要的则是错，什么也不写。
    argv = ["import", str(tmp_path / "hub"), "--tokenizer", str(tmp_path / "hub")]
    assert main([*argv, "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()

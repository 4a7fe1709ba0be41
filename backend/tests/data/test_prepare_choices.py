"""prepare 的选项：分篇、自己的验证文本、现成的分词器；没有用处的选项被拒绝。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.data.hub_tokenizer import HubTokenizer
from app.data.prepare import Summary, TokenizerSpec, prepare
from app.data.reading.sources import Reading, Sources
from app.data.tokenizers import CharTokenizer, Tokenizer

from .helpers import documents_of, run, write_corpus


def say_all(
    source: Sources, out: Path, spec: TokenizerSpec, **options: Any
) -> tuple[Summary, list[str]]:
    said: list[str] = []
    return prepare(source, out, spec, say=said.append, **options), said


def test_separator_text_becomes_the_border(tmp_path: Path) -> None:
    """59 处 `<|endoftext|>`：不说就是普通文本，而且会提起；给了选项就是 60 篇。"""
    path = tmp_path / "a.txt"
    stories = [f"story {i}\n" for i in range(60)]
    path.write_text("<|endoftext|>".join(stories), encoding="utf-8")
    spec = TokenizerSpec("bytes")
    _, said = say_all(Sources([path]), tmp_path / "raw", spec, val_fraction=0.0)
    assert any(
        "'<|endoftext|>' stands 59 times in the text and is taken as plain" in s for s in said
    )
    reading = Reading(document_separator="<|endoftext|>")
    summary, said = say_all(Sources([path], reading), tmp_path / "split", spec, val_fraction=0.0)
    assert documents_of(summary.sides["train"]) == stories
    assert not any("stands" in line for line in said)


def test_own_validation_text(tmp_path: Path) -> None:
    """全部来源用于训练，val 就是给出的；同一篇在两边就警告。"""
    for name, text in {"a": "train one", "b": "shared", "c": "held é"}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    train = Sources([tmp_path / "a.txt", tmp_path / "b.txt"])
    spec = TokenizerSpec("chars")
    held = Sources([tmp_path / "c.txt"])
    summary, said = say_all(train, tmp_path / "o1", spec, val=held, val_fraction=0.0)
    assert documents_of(summary.sides["train"]) == ["train one", "shared"]
    assert documents_of(summary.sides["val"]) == ["held é"]
    assert summary.sides["val"].meta["source"]["split"] == "given"
    assert not any("warning" in line for line in said)
    both = Sources([tmp_path / "c.txt", tmp_path / "b.txt"])
    _, said = say_all(train, tmp_path / "o2", spec, val=both, val_fraction=0.0)
    (warning,) = [line for line in said if "warning" in line]
    assert "1 documents are in both" in warning and "b.txt" in warning
    # 同样的文本，分界不同，就是另一条命令
    with pytest.raises(ValueError, match="val_documents was 2 and is now 1"):
        moved = Sources([tmp_path / "b.txt", tmp_path / "a.txt", tmp_path / "b.txt"])
        say_all(moved, tmp_path / "o2", spec, val=held, val_fraction=0.0)


def test_ready_tokenizer(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", 20)
    first = run(source, tmp_path / "first", "bpe", vocab_size=300)
    tokenizer = first.sides["train"].tokenizer()
    spec = TokenizerSpec.of(tokenizer)
    (tmp_path / "b.txt").write_text("data 中文 model\n" * 30, encoding="utf-8")
    summary, _ = say_all(Sources([tmp_path / "b.txt"]), tmp_path / "second", spec)
    assert summary.sides["train"].tokenizer().fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ValueError, match="vocab_size=300 .* one of 300 ids is given"):
        TokenizerSpec("bpe", 300, given=tokenizer)
    with pytest.raises(ValueError, match=r"fingerprint was '\w+' and is now None"):
        run(tmp_path / "b.txt", tmp_path / "second", "bpe", vocab_size=300)


@pytest.mark.parametrize("separator", [True, False])
def test_ready_characters(separator: bool, tmp_path: Path) -> None:
    tokenizer = CharTokenizer("\nba", separator=separator)
    path = tmp_path / "a.txt"
    path.write_text("ab\nba", encoding="utf-8")
    spec = TokenizerSpec.of(tokenizer)
    summary, _ = say_all(Sources([path]), tmp_path / "out", spec, val_fraction=0.0)
    data = summary.sides["train"]
    assert data.read(0, data.n_tokens).tolist() == [2, 1, 0, 1, 2] + [3] * separator
    path.write_text("ab\nbé中", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"a\.txt line 2: 2 characters .* tokenizer's 3: 'é' \(U\+00E9\), "
    ):
        say_all(Sources([path]), tmp_path / "other", spec, val_fraction=0.0)
    assert not (tmp_path / "other").exists()


def test_foreign_tokenizer_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """切成小段的文档与整篇编码相同：补空格与句首只在文档开头。"""
    from app.data import split
    from tests.data.test_hub_tokenizer import byte_level, metaspace

    monkeypatch.setattr(split, "UNIT_CHARS", 50)
    text = "the quick brown fox </s> jumps over the lazy dog " * 8
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    for name, hub in (("space", byte_level(True)), ("llama", metaspace("first"))):
        tokenizer: Tokenizer = HubTokenizer(hub.to_str(), hub.token_to_id("<eos>"))
        spec = TokenizerSpec.of(tokenizer)
        summary, said = say_all(Sources([path]), tmp_path / name, spec, val_fraction=0.0)
        data = summary.sides["train"]
        wanted = [*tokenizer.start_ids, *tokenizer.encode(text), tokenizer.document_separator]
        assert data.read(0, data.n_tokens).tolist() == wanted
        assert data.tokenizer().fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(text_key="body"), r"--text-key body has nothing to read: .* \(1 \.txt\)"),
        (Reading(suffixes=(".txt",)), r"--suffixes \.txt needs a folder"),
        (Reading(document_separator="<end>"), "--document-separator '<end>' is nowhere in"),
    ],
)
def test_an_option_that_nothing_uses_is_refused(
    reading: Reading, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text " * 20, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        say_all(Sources([tmp_path / "a.txt"], reading), tmp_path / "out", TokenizerSpec("bytes"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "b.json").write_text('["x"]', encoding="utf-8")
    lines = Reading(document_per_line=True)
    with pytest.raises(ValueError, match=r"--document-per-line splits plain text, .* \(1 \.json\)"):
        say_all(Sources([tmp_path / "b.json"], lines), tmp_path / "out", TokenizerSpec("bytes"))

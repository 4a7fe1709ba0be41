"""prepare：正确、恒定内存、不碰别人的文件。"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data import prepare as prepare_module
from app.data.journal import JOURNAL_FILE, LOCK_FILE
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.shards import TokenDataset

from .helpers import documents_of, run, tree, write_corpus

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_every_document_comes_back(kind: str, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    size = 300 if kind == "bpe" else None
    summary = run(source, tmp_path / "out", kind, vocab_size=size, shard_tokens=10_000)
    wanted = sorted("".join(d.pieces()) for d in Sources([source]).documents())
    train, val = (TokenDataset.open(tmp_path / "out" / s, "sha256") for s in ("train", "val"))
    assert sorted(documents_of(train) + documents_of(val)) == wanted
    assert val.meta["source"]["split"] == "hash" and len(val.document_starts) > 10
    assert summary.documents == len(wanted) == 401
    assert summary.tokens == train.n_tokens + val.n_tokens
    assert summary.bytes == sum(len(t.encode()) for t in wanted)
    assert train.meta["n_bytes"] + val.meta["n_bytes"] == summary.bytes
    assert train.meta["tokenizer"] == val.meta["tokenizer"]
    assert len(train.meta["files"]) > 3


def test_user_text_with_the_separator_stays_text(tmp_path: Path) -> None:
    text = "before <|endoftext|> after " * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for kind in ("bytes", "chars", "bpe"):
        size = 280 if kind == "bpe" else None
        run(tmp_path / "a.txt", tmp_path / kind, kind, vocab_size=size, val_fraction=0.0)
        dataset = TokenDataset.open(tmp_path / kind / "train")
        assert documents_of(dataset) == [text]
        ids = dataset.read(0, dataset.n_tokens)
        assert np.flatnonzero(ids == dataset.tokenizer().document_separator).tolist() == [
            len(ids) - 1
        ]


def test_tinyshakespeare_counts(tmp_path: Path) -> None:
    """nanoGPT 的 prepare.py 打印的词元数（字符与 GPT-2），加上我们每篇一个的分隔符。"""
    path = SHARED / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    chars = run(path, tmp_path / "chars", "chars").sides
    assert (chars["train"].n_tokens, chars["val"].n_tokens) == (1_003_854 + 1, 111_540 + 1)
    assert chars["train"].vocab_size == 65 + 1
    if not (SHARED / "gpt2_vocab.bpe").is_file():
        pytest.skip(f"no GPT-2 vocabulary files in {SHARED}")
    spec = TokenizerSpec("gpt2", vocab_files=SHARED)
    gpt2 = prepare(Sources([path]), tmp_path / "gpt2", spec, say=lambda _: None).sides
    assert (gpt2["train"].n_tokens, gpt2["val"].n_tokens) == (301_966 + 1, 36_059 + 1)


def test_second_run_does_nothing(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", 10)
    assert run(source, tmp_path / "out").fresh
    before = tree(tmp_path / "out")
    said: list[str] = []
    again = prepare(Sources([source]), tmp_path / "out", TokenizerSpec("bytes"), say=said.append)
    assert not again.fresh
    assert any("nothing to do" in line for line in said)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chars"}, "tokenizer was 'bytes' and is now 'chars'"),
        ({"val_fraction": 0.2}, r"val_fraction was 0\.1 and is now 0\.2"),
        ({"shard_tokens": 99}, "shard_tokens was 67108864 and is now 99"),
    ],
)
def test_another_command_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", 10)
    run(source, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", **options)
    with open(source / "b.txt", "a", encoding="utf-8") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"content\.bytes was \d+ and is now \d+"):
        run(source, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", 5)
    cases = {"notes.txt": "out", "train/data.bin": "out", "train/tokens-00000.bin": "new"}
    for name, where in cases.items():
        out = tmp_path / name.replace("/", "-") / where
        if where == "out":
            run(source, out)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine", encoding="utf-8")
        before = tree(out)
        with pytest.raises(ValueError, match="which `gpt2 prepare` did not write"):
            run(source, out)
        assert tree(out) == before
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file: choose another --out"):
        run(source, tmp_path / "file")


def test_failed_start_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """分词器造不成、磁盘放不下：换一种命令还能用同一个文件夹。"""
    source = write_corpus(tmp_path / "in", 5)
    spec = TokenizerSpec("gpt2", vocab_files=tmp_path)
    with pytest.raises(ValueError, match="no GPT-2 vocabulary files"):
        prepare(Sources([source]), tmp_path / "out", spec, say=lambda _: None)
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000})
        patch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ValueError, match=r"needs about \d+ MB, but the disk has only"):
            run(source, tmp_path / "out")
    assert run(source, tmp_path / "out").fresh


def test_changed_while_reading_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path / "in", 5)
    original = prepare_module._Job._encode

    def change_then_encode(job: Any, tokenizer: Any) -> None:
        with open(source / "b.txt", "a", encoding="utf-8") as file:
            file.write("late")
        original(job, tokenizer)

    monkeypatch.setattr(prepare_module._Job, "_encode", change_then_encode)
    with pytest.raises(ValueError, match="changed while they were read"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "meta.json").exists()


def test_damaged_result_is_named(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", 5)
    run(source, tmp_path / "out")
    shard = tmp_path / "out" / "train" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin.* the file was cut or changed"):
        run(source, tmp_path / "out")
    (tmp_path / "out" / JOURNAL_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"prepare\.json: not readable"):
        run(source, tmp_path / "out")


def test_two_at_once(tmp_path: Path) -> None:
    from filelock import FileLock

    source = write_corpus(tmp_path / "in", 5)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / LOCK_FILE),
        pytest.raises(ValueError, match="another `gpt2 prepare` is writing there"),
    ):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bytes", "vocab_size": 300}, "vocab_size=300 belongs to the bpe tokenizer"),
        ({"kind": "bpe", "vocab_files": Path("x")}, "vocab_files=x belongs to the gpt2 tokenizer"),
    ],
)
def test_useless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerSpec(**options)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """同一配方、八倍的输入：峰值内存只许多出一点（文本文件与 jsonl 都是）。"""
    line = json.dumps({"text": "some ordinary words and 中文 in a line " * 10}) + "\n"
    peaks = []
    for size in (1, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        with open(folder / "a.txt", "w", encoding="utf-8") as file:
            for _ in range(size * 8):
                file.write("words to be read in pieces, é\n" * 20_000)
        with open(folder / "b.jsonl", "w", encoding="utf-8") as file:
            for _ in range(size * 1000):
                file.write(line)
        tracemalloc.start()
        run(folder, tmp_path / f"out{size}", val_fraction=0.2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0] + 1e6

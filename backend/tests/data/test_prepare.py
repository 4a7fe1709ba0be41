"""prepare：正确、可续（真的 kill -9）、恒定内存、不碰别人的文件。"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data import prepare as prepare_module
from app.data.hub_tokenizer import HubTokenizer
from app.data.journal import JOURNAL_FILE, LOCK_FILE
from app.data.prepare import Summary, TokenizerSpec, prepare
from app.data.reading.sources import Reading, Sources
from app.data.shards import TokenDataset
from app.data.tokenizers import CharTokenizer, Tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "data"
BACKEND = Path(__file__).parents[2]


def run(source: Path, out: Path, kind: Any = "bytes", **options: Any) -> Summary:
    spec = TokenizerSpec(kind, options.pop("vocab_size", None))
    return prepare(Sources([source]), out, spec, say=lambda _: None, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != LOCK_FILE
    }


def write_corpus(folder: Path, documents: int = 400) -> Path:
    folder.mkdir()
    words = random.Random(0)
    lines = []
    for i in range(documents):
        size = words.randrange(30, 300)
        text = " ".join(words.choice(["é", "data", "中文", "model\n", "a"]) for _ in range(size))
        lines.append(json.dumps({"text": f"{i} {text}"}))
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.txt").write_text("plain text, no line end " * 500, encoding="utf-8")
    return folder


def documents_of(dataset: TokenDataset) -> list[str]:
    tokenizer = dataset.tokenizer()
    borders = [*dataset.document_starts.tolist(), dataset.n_tokens]
    texts = []
    for start, end in zip(borders, borders[1:], strict=False):
        ids = dataset.read(start, end - start).tolist()
        assert ids[-1] == tokenizer.document_separator
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


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


# 真的 kill -9：子进程在第 k 次同步、改名或删除之前杀死自己（k < 0：从不），
# 或由父进程在随机的时刻杀死。
CHILD = """
import os, signal, sys
from pathlib import Path
from app.data import prepare, split
from app.data.reading.sources import Reading, Sources

source, out, kind, limit = sys.argv[1:5]
prepare.CHECKPOINT_CHARS, prepare._BATCH_CHARS, split.UNIT_CHARS = 40_000, 10_000, 3_000
count = 0

def guarded(function):
    def call(*args, **kwargs):
        global count
        if count == int(limit):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return function(*args, **kwargs)
    return call

os.fsync, os.replace, Path.unlink = map(guarded, (os.fsync, os.replace, Path.unlink))
spec = prepare.TokenizerSpec(kind, 300 if kind == "bpe" else None)
prepare.prepare(Sources([source]), Path(out), spec, shard_tokens=30_000)
print("calls", count)
"""


def child(source: Path, out: Path, kind: str, limit: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(out), kind, str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=BACKEND,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode, output


def check_kills(tmp_path: Path, kind: str, choose: Callable[[int], list[int]]) -> None:
    source = write_corpus(tmp_path / "in")
    _, output = finish(child(source, tmp_path / "whole", kind, -1))
    wanted, calls = tree(tmp_path / "whole"), int(output.split("calls")[1])
    assert calls > 30
    resumed = 0
    for limit in choose(calls):
        out = tmp_path / f"killed-{limit}"
        assert finish(child(source, out, kind, limit))[0] == -signal.SIGKILL
        code, output = finish(child(source, out, kind, -1))
        assert code == 0
        resumed += "resuming after" in output
        assert tree(out) == wanted, f"killed before call {limit}"
    assert resumed > 0


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_some_points(tmp_path: Path) -> None:
    points = random.Random(1)
    check_kills(tmp_path, "bytes", lambda n: sorted({*points.sample(range(n), 8), n - 1, n - 4}))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_killed_at_every_point(kind: str, tmp_path: Path) -> None:
    check_kills(tmp_path, kind, lambda n: list(range(n)))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """同一个文件夹一再被杀，直到做完；与没被杀过的逐字节相同。"""
    source = write_corpus(tmp_path / "in", 20_000)
    start = time.monotonic()
    finish(child(source, tmp_path / "whole", "bytes", -1))
    usual = time.monotonic() - start
    moments, kills = random.Random(2), 0
    while kills < 10:
        process = child(source, tmp_path / "out", "bytes", -1)
        time.sleep(moments.uniform(0.2, 1.0) * usual)
        process.kill()
        code, _ = finish(process)
        kills += 1
        if code == 0:
            break
    finish(child(source, tmp_path / "out", "bytes", -1))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


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

"""`gpt2 prepare`：帮助不导入 torch，错误是一句话和退出码 2，总结里有数字。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.cli.commands.prepare import _unescaped
from app.cli.main import main
from app.data.shards import TokenDataset
from app.data.tokenizers import load_tokenizer
from app.training.saving.checkpoint import write_checkpoint


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one line\r\nand another\n" * 50)
    return path


def test_prepares_a_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prepare", str(text), "--out", str(out), "--tokenizer", "bytes"]) == 0
    printed = capsys.readouterr().out
    assert "1 documents, 1,102 tokens, 1.00 bytes per token, vocabulary 257" in printed
    assert str(out) in printed
    train = TokenDataset.open(out / "train", verify="sha256")
    assert train.tokenizer().decode(train.read(0, 10)) == "one line\r\n"
    assert main(["prepare", str(text), "--out", str(out), "--tokenizer", "bytes"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.txt", "--out", "OUT"], "nowhere.txt: there is no such file or folder"),
        (["TEXT"], "say with --out"),
        (["TEXT", "--out", "OUT", "--val-fraction", "1.5"], "val_fraction=1.5 must be in"),
        (["TEXT", "--out", "OUT", "--shard-tokens", "0"], "shard_tokens=0"),
        (["TEXT", "--out", "OUT", "--tokenizer", "bytes", "--vocab-size", "300"], "vocab_size=300"),
        (["TEXT", "--out", "OUT", "--vocab-size", "20"], "vocab_size=20 must be between 257"),
        (["--suffixes", ".txt", "--out", "OUT"], "--suffixes .txt needs a folder"),
        (["TEXT", "--out", "TEXT"], "is a file: choose another --out"),
        (["JUNK", "--out", "OUT"], "junk.txt: not UTF-8 text (NUL byte at 1)"),
        (["EMPTY", "--out", "OUT"], "no text there"),
        (["TEXT", "--out", "OUT", "--val", "TEXT", "--val-fraction", "0.1"], "give one of them"),
        (["", "--out", "OUT"], "is a shell variable not set?"),
        (["--text-key", "body"], "--text-key body needs a folder or file to read"),
        (["TEXT", "--out", "OUT", "--tokenizer", "nowhere"], "neither one of bytes, chars, gpt2"),
        (["TEXT", "--out", "OUT", "--tokenizer", "FOREIGN"], "run `gpt2 import"),
        (["TEXT", "--out", "OUT", "--tokenizer", "."], "cannot be loaded"),
        (["TEXT", "--out", "OUT", "--tokens", "uint16"], "--tokenizer bpe would be made from text"),
        (["TEXT", "--out", "OUT", "--tokens", "uint16", "--text-key", "x"], "--text-key x is for"),
        (["--tokens", "uint16", "--tokenizer", "bytes"], "needs a folder with train.bin"),
    ],
)
def test_wrong_use_is_one_sentence(
    argv: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "junk.txt").write_bytes(b"\x7f\0ELF")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "tokenizer.json").write_text("{}", encoding="utf-8")
    names = {
        "OUT": str(tmp_path / "out"),
        "TEXT": str(text),
        "JUNK": str(tmp_path / "junk.txt"),
        "EMPTY": str(tmp_path / "empty.txt"),
        "FOREIGN": str(tmp_path / "foreign"),
    }
    before = text.read_bytes()
    assert main(["prepare", *(names.get(a, a) for a in argv)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors
    assert errors.count("\n") == 1
    assert text.read_bytes() == before


def test_help_is_instant_and_imports_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from app.cli.main import main\n"
        "try:\n    main(['prepare', '--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "bad = {'torch', 'numpy', 'tokenizers', 'tiktoken'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in ("--out", "--tokenizer", "--vocab-size", "--vocab-files", "examples:"):
        assert flag in done.stdout


def test_a_folder_of_code_is_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "code"
    code.mkdir()
    for number in range(30):
        (code / f"{number}.py").write_text(f"print({number})\n", encoding="utf-8")
    (code / "README.md").write_text("read me", encoding="utf-8")
    (code / "config.json").write_text("{}", encoding="utf-8")
    argv = ["prepare", str(code), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "30 .py, 1 .md" in printed and "not read: 1 .json" in printed
    assert "31 documents" in printed


def test_tokenizer_of_a_folder_and_ready_tokens(text: Path, tmp_path: Path) -> None:
    """数据集的分词器再用一次；nanoGPT 的 train.bin 用它的 id。"""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main(["prepare", str(text), "--out", str(first), "--tokenizer", "chars"]) == 0
    write_checkpoint(tmp_path / "run", 7, load_tokenizer(first / "train").save)
    for folder in (first, first / "train", tmp_path / "run"):
        out = second / folder.name
        argv = ["prepare", str(text), "--out", str(out), "--tokenizer", str(folder)]
        assert main([*argv, "--val", str(text)]) == 0
        data = TokenDataset.open(out / "val")
        assert data.n_tokens == 1101
        assert data.tokenizer().fingerprint() == (
            TokenDataset.open(first / "train").tokenizer().fingerprint()
        )
    ready = tmp_path / "nano"
    ready.mkdir()
    np.array([1, 2, 3], dtype="<u2").tofile(ready / "train.bin")
    np.array([2, 1], dtype="<u2").tofile(ready / "val.bin")
    argv = ["prepare", str(ready), "--tokens", "uint16", "--tokenizer", str(first)]
    assert main([*argv, "--out", str(third)]) == 0
    assert TokenDataset.open(third / "train").read(0, 3).tolist() == [1, 2, 3]
    assert main([*argv, "--out", str(third), "--val-fraction", "0.2"]) == 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"\n\n", "\n\n"), (r"\\n", r"\n"), (r"a\tb\r", "a\tb\r"), ("<|x|>", "<|x|>"), (r"\d", r"\d")],
)
def test_line_ends_can_be_typed(written: str, meant: str) -> None:
    assert _unescaped(written) == meant


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.csv"
    path.write_text("question,answer\n" + "".join(f"q {i}?,a\\{i}\n" for i in range(30)))
    return path


RENAME = ["--columns", "prompt=question,completion=answer"]


def test_prepares_conversations(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["prepare", str(chats), "--out", str(tmp_path / "out"), "--tokenizer", "bytes", *RENAME]
    assert main([*argv, "--val", "0.2", "--chat", "chatml", "--show", "2"]) == 0
    printed = capsys.readouterr().out
    assert "records of the form prompt + completion" in printed
    assert "the vocabulary grows from 257 to 259 ids by <|im_end|>, <|im_start|>" in printed
    line = next(x for x in printed.splitlines() if x.startswith("<|im_start|>"))
    assert line.endswith(r"|t|\n|{a|\|" + line[line.index("|?") - 1] + r"|<|im_end|>}|\n")
    assert "\x1b" not in printed
    train = TokenDataset.open(tmp_path / "out" / "train", verify="sha256")
    assert train.kind == "pairs" and f"{train.n_scored:,} scored" in printed
    # 接着用这里的分词器，就是接着用这里的模板
    more = ["--tokenizer", str(tmp_path / "out"), "--out", str(tmp_path / "more")]
    assert main(["prepare", str(chats), *more, *RENAME]) == 0
    assert "chat template chatml (that of the tokenizer's folder" in capsys.readouterr().out
    other = TokenDataset.open(tmp_path / "more" / "train")
    assert other.template() == train.template() and other.vocab_size == train.vocab_size


def test_records_are_told_apart_by_their_keys(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(["prepare", str(chats), *out]) == 2
    assert "add --columns prompt=question,completion=answer" in capsys.readouterr().err
    assert main(["prepare", str(chats), *out, *RENAME, "--format", "preference"]) == 2
    assert "--format preference, but the keys are those of pairs" in capsys.readouterr().err
    text = ["--columns", "text=answer", "--val", "0", "--special", "<|a|>,<|b|>"]
    assert main(["prepare", str(chats), *out, *text]) == 0
    train = TokenDataset.open(tmp_path / "out" / "train")
    assert train.kind == "text" and train.vocab_size == 259
    assert train.meta["schema_version"] == 1


def test_a_folder_of_tables_or_of_both(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    chats.rename(folder / "a.csv")
    argv = ["prepare", str(folder), "--tokenizer", "bytes", "--val", "0", "--out"]
    assert main([*argv, str(tmp_path / "1"), *RENAME]) == 0
    (folder / "a.csv").write_text("prompt,completion\na,b\n")
    assert main([*argv, str(tmp_path / "2")]) == 0
    (folder / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "c.md").write_text("plain text")
    capsys.readouterr()
    assert main([*argv, str(tmp_path / "3")]) == 2
    assert "there are also 1 .md of plain text: choose with --format" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "3"), "--format", "pairs"]) == 0
    assert len(TokenDataset.open(tmp_path / "3" / "train").document_starts) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--chat", "plain"], "--chat plain is for conversations, but these sources are text"),
        (
            ["--lines", "--context", "9"],
            "--context 9 is for conversations, but --document-per-line",
        ),
        (["--columns", "prompt=x"], "of text, text alone can be renamed"),
        (["--tokens", "uint16", "--long", "cut-prompt"], "--long cut-prompt is for records"),
        (["--show", "-1"], "--show -1 must not be negative"),
        (["--val", "0.1", "--val-fraction", "0.1"], "--val 0.1 and --val-fraction 0.1"),
    ],
)
def test_chat_options_without_use_are_refused(
    argv: list[str], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(text), "--out", str(tmp_path / "out"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

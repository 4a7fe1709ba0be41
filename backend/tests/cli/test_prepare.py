"""`gpt2 prepare`：帮助不导入 torch，错误是一句话和退出码 2，总结里有数字。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.cli.main import main
from app.data.shards import TokenDataset


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
    names = {
        "OUT": str(tmp_path / "out"),
        "TEXT": str(text),
        "JUNK": str(tmp_path / "junk.txt"),
        "EMPTY": str(tmp_path / "empty.txt"),
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

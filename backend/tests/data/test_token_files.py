"""现成的词元文件：id 原样，按分隔符成篇，错的点名。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data import token_files
from app.data.shards import TokenDataset
from app.data.token_files import TokenFiles, prepare_tokens
from app.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

END = 256


def write(path: Path, ids: list[int], dtype: str = "<u2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array(ids, dtype=dtype).tofile(path)
    return path


def run(
    files: TokenFiles, out: Path, tokenizer: Tokenizer | None = None, val_fraction: float = 0.0
) -> dict[str, TokenDataset]:
    return prepare_tokens(
        files,
        out,
        tokenizer or ByteTokenizer(),
        val_fraction=val_fraction,
        shard_tokens=7,
        say=lambda _: None,
    )


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.sampled_from([97, 98, END]), min_size=1, max_size=40),
    wide=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_ids_come_over_unchanged(
    ids: list[int], wide: bool, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("t")
    path = write(folder / "a.bin", ids, "<u4" if wide else "<u2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_CHUNK", chunk)
        files = TokenFiles.find((path,), (), "uint32" if wide else "uint16")
        data = run(files, folder / "out")["train"]
    assert data.read(0, data.n_tokens).tolist() == ids
    starts = [0, *(i + 1 for i, t in enumerate(ids[:-1]) if t == END)]
    assert data.document_starts.tolist() == starts
    assert data.meta["n_bytes"] == sum(t != END for t in ids)
    TokenDataset.open(folder / "out" / "train", verify="sha256")


def test_a_folder_of_nano_gpt(tmp_path: Path) -> None:
    write(tmp_path / "d/train.bin", [1, 2, END, 3])
    write(tmp_path / "d/val.bin", [4, END])
    sides = run(TokenFiles.find((tmp_path / "d",), (), "uint16"), tmp_path / "out")
    assert [sides["train"].n_tokens, sides["val"].n_tokens] == [4, 2]
    again = run(TokenFiles.find((tmp_path / "d",), (), "uint16"), tmp_path / "out")
    assert again["train"].fingerprint == sides["train"].fingerprint
    write(tmp_path / "d/val.bin", [5, END])
    with pytest.raises(ValueError, match=r"content\.val\.sha256 was"):
        run(TokenFiles.find((tmp_path / "d",), (), "uint16"), tmp_path / "out")


def test_a_share_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", list(range(20)))
    sides = run(TokenFiles.find((path,), (), "uint16"), tmp_path / "out", val_fraction=0.25)
    assert sides["train"].read(0, 15).tolist() == list(range(15))
    assert sides["val"].read(0, 5).tolist() == list(range(15, 20))


def test_a_tokenizer_without_separator(tmp_path: Path) -> None:
    """nanoGPT 的字符数据：65 行的词表，一篇到底。"""
    tokenizer = CharTokenizer("ba", separator=False)
    files = TokenFiles.find((write(tmp_path / "a.bin", [0, 1, 0]),), (), "uint16")
    data = run(files, tmp_path / "out", tokenizer)["train"]
    assert (data.vocab_size, data.document_starts.tolist()) == (2, [0])
    assert data.tokenizer().decode(data.read(0, 3)) == "bab"


def test_a_killed_run_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TokenFiles.find((write(tmp_path / "a.bin", [1, END] * 20),), (), "uint16")
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "out")
    assert run(files, tmp_path / "out")["train"].n_tokens == 40


@pytest.mark.parametrize(
    ("data", "dtype", "message"),
    [
        (np.array([1, 300], "<u2").tobytes(), "uint16", "token 1 is 300, outside .* 257 ids"),
        (b"abc", "uint16", "3 bytes are not a whole number of 16-bit tokens"),
        (b"", "uint16", "0 bytes"),
        (np.arange(40, dtype="<u4").tobytes(), "uint16", "as in uint32: use --tokens uint32"),
        (np.arange(40, dtype="<u2").tobytes(), "uint32", "token 0 is 65536, outside"),
        (b"\x93NUMPY\x01\x00\x76\x00", "uint16", "is a .npy file"),
        ((20240520).to_bytes(4, "little") * 300, "uint16", "llm.c's header"),
    ],
)
def test_wrong_files_are_named(data: bytes, dtype: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.bin.*{message}"):
        run(TokenFiles.find((path,), (), dtype), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_wrong_sides_are_named(tmp_path: Path) -> None:
    write(tmp_path / "d/train.bin", [1])
    write(tmp_path / "d/val.bin", [1])
    both = (tmp_path / "d",)
    with pytest.raises(ValueError, match="give one of them"):
        TokenFiles.find(both, (tmp_path / "d/val.bin",), "uint16")
    with pytest.raises(ValueError, match="got 2 and 0"):
        TokenFiles.find(both * 2, (), "uint16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train\.bin: there is no such file"):
        TokenFiles.find((tmp_path / "empty",), (), "uint16")
    files = TokenFiles.find((write(tmp_path / "a.bin", [1]),), (), "uint16")
    with pytest.raises(ValueError, match="1 tokens are too few"):
        run(files, tmp_path / "out", val_fraction=0.5)

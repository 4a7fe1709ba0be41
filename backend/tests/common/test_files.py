"""落盘：权限照 umask，写到一半断了什么也不留，别人的东西绝不动。"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cli.main import main
from app.common.files import check_free, check_new, write_atomic, write_folder, write_new
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.data.tokenizers import ByteTokenizer
from app.interop.export import export
from app.interop.reading.importing import Imported, write_model
from app.models.transformer import GPT2Model

from ..models.helpers import tiny_model

UMASKS = (0o022, 0o027)


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def model() -> GPT2Model:
    return tiny_model(torch.float32, vocab_size=257, norm="pre")


def everything(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.rglob("*")) if path.is_file() or path.is_dir()]


def check_modes(folder: Path, umask: int) -> set[str]:
    """folder 里的一切；返回文件名。"""
    for path in everything(folder):
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert mode == wanted, f"{path}: {mode:o}, umask {umask:o} says {wanted:o}"
    return {path.name for path in everything(folder) if path.is_file()}


def own_code(out: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    export(tiny_model(torch.float32, vocab_size=257, norm="keel"), None, "hf", out)


def to(target: Any) -> Callable[[Path], object]:
    def write(out: Path) -> None:
        pytest.importorskip({"gguf": "gguf", "onnx": "onnxruntime"}.get(target, "transformers"))
        if target == "onnx":
            pytest.importorskip("onnxscript")
        export(model(), ByteTokenizer(), target, out)

    return write


WRITERS: dict[str, Callable[[Path], object]] = {
    "atomic": lambda out: (out.mkdir(), write_atomic(out / "a", b"x")),
    "new": lambda out: (out.mkdir(), write_new(out / "a", b"x")),
    "model": lambda out: model().save_pretrained(out),
    "import": lambda out: write_model(Imported(model(), ByteTokenizer()), out),
    "own code": own_code,
    "hf": to("hf"),
    "gguf": to("gguf"),
    "onnx": to("onnx"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "onnx" else n for n in WRITERS],
)
def test_modes_follow_the_umask(name: str, umask: int, tmp_path: Path) -> None:
    """别的用户、容器、网页服务器要读得到，只要 umask 许。"""
    out = tmp_path / "out"
    WRITERS[name](out)
    assert check_modes(out, umask)


def test_a_run_and_its_data_follow_the_umask(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the cat sat on a mat and then ran to the other cat\n" * 60)
    prepare(Sources((Path("a.txt"),)), Path("set"), TokenizerSpec("chars"), say=lambda line: None)
    shape = "--model.n-layer 2 --model.n-head 2 --model.n-embed 16 --model.context-size 16"
    short = "--steps 3 --batch-size 2 --schedule.warmup-steps 1 --save-every 1 --device cpu"
    words = f"train --data.folder set --out run {shape} {short} --model.norm pre"
    assert main(words.split()) == 0
    assert main(["upcycle", "run", "--experts", "2", "--out", "grown"]) == 0
    assert main(["eval", "run", "--json", "found.json"]) == 0
    names = check_modes(Path("run"), umask) | check_modes(Path("set"), umask)
    names |= check_modes(Path("grown"), umask) | check_modes(Path("found.json"), umask)
    assert {"model.safetensors", "optim.safetensors", "metrics.jsonl", "loss.png"} <= names


def test_a_model_saved_again_is_a_new_file(tmp_path: Path) -> None:
    """早先写成只有主人可读的，再存一次就好了：新的文件照 umask。"""
    before = os.umask(0o022)
    try:
        model().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").chmod(0o600)
        model().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert check_modes(tmp_path / "model.safetensors", 0o022) == {"model.safetensors"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(new: Path) -> None:
        (new / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "out", broken)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", lambda new: (new / "a").write_text("x"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_what_appears_while_writing_is_kept(tmp_path: Path) -> None:
    """写着的时候别的程序在 out 处写了东西：那是它的。"""

    def fill(new: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(ValueError, match="already exists: give another --out"):
        write_folder(tmp_path / "out", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "theirs").read_text() == "x"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_new(path, b"mine")
    with pytest.raises(FileExistsError):
        write_new(path, b"other")
    assert path.read_bytes() == b"mine"
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for taken in (path, tmp_path / "dangling", tmp_path):
        with pytest.raises(ValueError, match=r"json=.* already exists .*give another --json"):
            check_new(taken, "json")
    with pytest.raises(ValueError, match="the folder .*nowhere does not exist: create it first"):
        check_new(tmp_path / "nowhere" / "x")
    for taken in (path, tmp_path / "dangling", tmp_path):
        with pytest.raises(ValueError, match="already exists: give another --out"):
            check_free(taken)
    with pytest.raises(ValueError, match=r"\. is no new folder: give one with a name"):
        check_free(Path())


def test_half_a_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    write_atomic(tmp_path / "old", b"before")
    monkeypatch.setattr(os, "fsync", full)
    for write, name in ((write_new, "new"), (write_atomic, "old")):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / name, b"after")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old": b"before"}

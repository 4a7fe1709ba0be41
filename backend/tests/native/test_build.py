"""C 文件 的编译、缓存与装载：没有编译器、坏的编译器、不可信的缓存。"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.native import build as native
from app.native.build import build, cache_folder, find_compiler, load_native
from app.quantization.kernels import Case, choose_kernel


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """自己的缓存，不用向量指令（编得最快）；每次都重新装。"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    monkeypatch.setenv("GPT2_NATIVE", "generic")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)


@pytest.fixture
def compiler() -> str:
    found = find_compiler()
    if found is None:
        pytest.skip("no C compiler on PATH")
    return found


def fake(folder: Path, body: str) -> str:
    path = folder / "fake-cc"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_built_once_and_found_again(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_native()
    assert first.handle is not None, first.reason
    assert first.reason.startswith(f"built with {Path(compiler).name}, generic C")
    files = list(cache_folder().iterdir())
    assert [file.suffix for file in files] == [".so"]
    assert files[0].stat().st_mode & 0o077 == 0

    monkeypatch.setattr(native, "_compile", lambda *args: pytest.fail("compiled again"))
    assert load_native().handle is not None


def test_another_target_is_another_file(compiler: str) -> None:
    assert native._key(compiler, "generic") != native._key(compiler, "native")


@pytest.mark.parametrize("name", (*native.SOURCES, *native.HEADERS))
def test_another_source_is_another_file(
    name: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = native._key(compiler, "generic")
    shutil.copytree(native.FOLDER, tmp_path / "native")
    changed = tmp_path / "native" / name
    changed.write_text(changed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(native, "FOLDER", tmp_path / "native")
    assert native._key(compiler, "generic") != before


def test_another_processor_is_another_file(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native._key(compiler, "generic")
    monkeypatch.setattr(native, "_cpu", lambda: "another")
    assert native._key(compiler, "generic") != before


def test_no_compiler_says_so_and_torch_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert load_native().handle is None
    choice = choose_kernel(Case(16, 64, 64))
    assert choice.reason.startswith("torch: ")
    assert "not native: no C compiler (cc, gcc or clang) on PATH" in choice.reason


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_NATIVE", "off")
    assert load_native() == native.Native(None, "GPT2_NATIVE=off")


def test_an_unknown_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_NATIVE", "fast")
    with pytest.raises(ValueError, match="GPT2_NATIVE='fast': expected off, native, avx2, generic"):
        load_native()


def test_a_broken_compiler_says_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = fake(
        tmp_path, '[ "$1" = --version ] && exit 0\necho "x.c:1: error: broken" >&2; exit 1'
    )
    monkeypatch.setenv("CC", broken)
    assert load_native() == native.Native(None, f"{broken}: x.c:1: error: broken")
    assert list(cache_folder().iterdir()) == []


def test_a_compiler_that_writes_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = '[ "$1" = --version ] && exit 0\nfor out; do :; done; echo rubbish > "$out"'
    monkeypatch.setenv("CC", fake(tmp_path, body))
    found = load_native()
    assert found.handle is None and "fake-cc" in found.reason


def test_without_openmp_it_runs_on_one_thread(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'case "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac\n{compiler} "$@"'
    monkeypatch.setenv("CC", fake(tmp_path, body))
    found = load_native()
    assert found.handle is not None, found.reason
    assert found.reason.endswith("generic C, one thread: no OpenMP")
    assert choose_kernel(Case(8, 64, 64)).kernel.name == "native"


def test_a_cache_that_cannot_be_written(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """根用户不受权限所限，所以用一个文件挡住文件夹的位置。"""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = load_native()
    assert found.handle is None and "file" in found.reason


def test_a_cache_that_others_can_write_is_not_trusted(compiler: str) -> None:
    folder = cache_folder()
    folder.chmod(0o777)
    found = load_native()
    assert found.handle is None
    assert f"{folder} can be written by others: chmod go-w {folder}" in found.reason


def test_a_library_that_others_can_write_is_not_loaded(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(compiler, "generic", cache_folder())
    path.chmod(0o722)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("loaded"))
    assert "can be written by others" in load_native().reason


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_cache_of_another_user_is_not_trusted(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os.getuid()
    cache_folder()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert f"belongs to user {owner}, not to {owner + 1}" in load_native().reason


@pytest.mark.slow
def test_built_by_several_at_once(compiler: str) -> None:
    folder = cache_folder()
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: build(compiler, "generic", folder), range(3)))
    assert len(set(paths)) == 1
    assert list(folder.iterdir()) == [paths[0]]
    assert native._open(paths[0]).gpt2_supported() == 1


@pytest.mark.parametrize("vnni", [(), ("-mavx512vnni",)])
def test_avx512_compiles_where_it_cannot_run(compiler: str, vnni: tuple[str, ...]) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86 compiler")
    flags = (*native.TARGETS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", *vnni)
    sources = [str(native.FOLDER / name) for name in native.SOURCES]
    command = [compiler, *native._COMMON, "-Wall", "-Werror", *flags, "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

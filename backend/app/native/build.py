"""几个 C 文件的编译与装载：有编译器就编一次、放进用户的缓存，没有就说出为什么没有。

编出的文件会被装进本进程，所以只认自己的：文件夹与文件都要属于本用户、别人写不了。名字里有
源文件、编译器与 CPU 的散列：换了哪一个都另编一份。
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("product.c", "step.c", "rows.c")
HEADERS = ("native.h", "step.h", "product_x86.h", "product_generic.h")
# off = 不用；其余的是编译目标：本机的全部指令、只用 AVX2、不用向量指令（测试与排错用）。
SWITCH = "GPT2_NATIVE"
TARGETS = {
    "native": ("-march=native",),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "generic": ("-DGPT2_GENERIC",),
}
# 并成乘加会让同一行的结果随展开的方式而变；后两项不改变数，没有它们 sqrt 与选择都不向量化。
_COMMON = (
    "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wno-psabi",
)  # fmt: skip
# -O3 编得慢一倍，跑得一样快；只有 gcc 认得第一组，只有带 OpenMP 的编译器认得前两组。
_FLAGS = (
    ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fopenmp"),
    ("-O3", "-fopenmp"),
    ("-O3",),
)
_TIMEOUT = 120


@dataclass(frozen=True)
class Native:
    """装好的库；handle 是 None 时 reason 说为什么没有，否则说是怎么来的。"""

    handle: ctypes.CDLL | None
    reason: str


def load_native() -> Native:
    """每个 GPT2_NATIVE 的值只装一次。

    Raises:
        ValueError: GPT2_NATIVE 不认得。
    """
    wanted = os.environ.get(SWITCH, "native")
    if wanted not in ("off", *TARGETS):
        raise ValueError(f"{SWITCH}={wanted!r}: expected off, {', '.join(TARGETS)}")
    return _load(wanted)


@cache
def _load(wanted: str) -> Native:
    if wanted == "off":
        return Native(None, f"{SWITCH}=off")
    compiler = find_compiler()
    if compiler is None:
        return Native(None, "no C compiler (cc, gcc or clang) on PATH")
    try:
        path = build(compiler, wanted, cache_folder())
        handle = _open(path)
    except (OSError, subprocess.SubprocessError) as error:
        return Native(None, f"{compiler}: {_short(error)}")
    if not handle.gpt2_supported():
        return Native(None, f"this CPU lacks the instructions of {SWITCH}={wanted}")
    how = handle.gpt2_instructions().decode()
    threads = "OpenMP" if handle.gpt2_threads() else "one thread: no OpenMP"
    return Native(handle, f"built with {Path(compiler).name}, {how}, {threads}")


def find_compiler() -> str | None:
    """$CC，或系统的 cc、gcc、clang。"""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gpt2-workbench，默认 ~/.cache 之下；不存在就建，只许本用户读写。

    Raises:
        PermissionError: 不属于本用户，或别人能写：放进去的库谁都能换掉。
        OSError: 建不了。
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "gpt2-workbench"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    return folder


def build(compiler: str, target: str, folder: Path) -> Path:
    """编出的库。已有就直接用；写在旁边再改名，几个进程同时编也各得一份完整的。

    Raises:
        OSError: 写不了，或已有的一份不是本用户的。
        subprocess.SubprocessError: 编译失败、超时。
    """
    path = folder / f"native-{_key(compiler, target)}.so"
    if path.exists():
        _check_private(path)
        return path
    file, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(file)
    try:
        _compile(compiler, target, temporary)
        os.chmod(temporary, 0o700)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _compile(compiler: str, target: str, out: str) -> None:
    sources = [str(FOLDER / name) for name in SOURCES]
    for flags in _FLAGS:
        command = [compiler, *_COMMON, *flags, *TARGETS[target], *sources, "-lm", "-o", out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        if done.returncode == 0:
            return
    done.check_returncode()


def _open(path: Path) -> ctypes.CDLL:
    handle = ctypes.CDLL(str(path))
    handle.gpt2_instructions.restype = ctypes.c_char_p
    handle.gpt2_product.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
    )  # fmt: skip
    handle.gpt2_step.argtypes = (
        ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5,
        ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
    )  # fmt: skip
    return handle


def _key(compiler: str, target: str) -> str:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT
    )
    files = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    digest = hashlib.sha256()
    flags = repr((_COMMON, _FLAGS, TARGETS[target]))
    for part in (*files, version.stdout, compiler.encode(), flags.encode(), _cpu().encode()):
        digest.update(b"\0" + part)
    return digest.hexdigest()[:32]


def _cpu() -> str:
    """-march=native 编出什么由它决定。"""
    info = Path("/proc/cpuinfo")
    known = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = sorted({line for line in lines if line.startswith(known)})
    return "\n".join((platform.machine(), platform.processor(), *facts))


def _check_private(path: Path) -> None:
    facts = path.stat()
    if hasattr(os, "getuid") and facts.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to user {facts.st_uid}, not to {os.getuid()}")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others: chmod go-w {path}")


def _short(error: Exception) -> str:
    """一行：编译器的第一条错误，或系统的话。"""
    text = getattr(error, "stderr", None) or str(error)
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0][:400] if lines else type(error).__name__

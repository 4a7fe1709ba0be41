"""落盘：写在旁边再改名、只写新的、同步、校验和。权限一律照 umask。"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


def write_atomic(path: Path, data: bytes) -> None:
    """先写旁边的临时文件并同步，再改名：任何时刻被杀，path 要么是旧的要么是新的。"""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            _write(file, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """写一个新文件；写不完就不留半个。

    Raises:
        FileExistsError: 那里已有文件，绝不覆盖。
    """
    file = path.open("xb")
    try:
        with file:
            _write(file, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def check_new(path: Path, option: str = "out") -> None:
    """动手之前就查，免得算完才知道写不下。

    Raises:
        ValueError: 那里已有东西（断了的链接也算），或上一层文件夹不存在。
    """
    if os.path.lexists(path):
        raise ValueError(
            f"{option}={path} already exists and is never overwritten: give another --{option}"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"{option}={path}: the folder {path.parent} does not exist: create it first"
        )


def check_free(folder: Path) -> None:
    """
    Raises:
        ValueError: folder 已有东西（空文件夹不算），或是 "." 这样没有自己名字的。
    """
    if not folder.name:
        raise ValueError(f"{folder} is no new folder: give one with a name, such as --out model")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists: give another --out, nothing is overwritten")


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """一个新的（或空的）文件夹，一下子出现：fill 收到旁边的一个空文件夹，往里写。

    Raises:
        ValueError: folder 已有东西：别人的文件从不覆盖。
    """
    check_free(folder)
    with written_beside(folder, folder.with_name(f".{folder.name}.{os.getpid()}")) as temporary:
        fill(temporary)
        check_free(folder)
        if folder.is_dir():
            folder.rmdir()


@contextmanager
def written_beside(folder: Path, temporary: Path) -> Iterator[Path]:
    """新建 temporary（上一次的残留先删去），写完才改名为 folder；出错则什么也不留下。"""
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """改名要等目录也落盘才算数；Windows 不能打开目录，也不需要。"""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

"""旧式的 pickle（pytorch_model.bin、nanoGPT 的 ckpt.pt 与 meta.pkl）：只在用户明说时才读。

weights_only=True 也出过漏洞（CVE-2025-32434、CVE-2026-24747），所以另有几道关：要 2.11 以上的
torch（pyproject 的下限）、只认 zip 格式、先看压缩包的目录（总大小与文件大小相称），mmap 读，
拒绝稀疏的与自相重叠的（步长为零的是其中一种）张量。
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.models.transformer.weights.safetensors_file import check_finite

# torch.save 从不压缩；解开后比文件大的只会是炸弹。目录与对齐留一点余地。
_SLACK_BYTES = 1 << 20
# 解 pickle 的部分（名字、形状）；XL 不到 200 KB。
_MAX_PICKLE_BYTES = 8 << 20


class Settings:
    """build-nanogpt 存下的配置对象的替身：只收字段，没有它的代码。"""


# 它的脚本自己定义的类；名字以外的一概不认。
_SETTINGS_NAMES = ("__main__.GPTConfig", "train_gpt2.GPTConfig", "model.GPTConfig")
# 数、文字与它们的表；没有一个能叫出代码或要内存的操作。
_PLAIN_OPCODES = re.compile(
    "PROTO|FRAME|STOP|MARK|NONE|NEWTRUE|NEWFALSE|INT|BININT[12]?|LONG1|FLOAT|BINFLOAT|UNICODE|"
    "(SHORT_)?BINUNICODE|(EMPTY_)?DICT|SETITEMS?|(EMPTY_)?LIST|APPENDS?|EMPTY_TUPLE|TUPLE[123]?|"
    "(LONG_)?(BIN)?(PUT|GET)|MEMOIZE"
)


class _Plain(pickle.Unpickler):
    """第二道：哪怕操作码漏看了，也没有一个名字找得到。"""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"{module}.{name} is no number and no text")


class LoadedTensors:
    """已在内存（或映射着）的一套张量，按需读出。"""

    def __init__(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        self.where = where
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name].clone().contiguous()
        if not tensor.is_floating_point():
            raise ValueError(f"{self.where}: tensor {name!r} holds {tensor.dtype}, expected floats")
        check_finite(tensor, name, self.where)
        return tensor


def load_pickle(path: Path) -> Any:
    """torch.load 得到的东西；其中的张量都映射在文件上，还没有读进内存。

    Raises:
        ValueError: 不是 torch.save 的 zip 文件、是压缩炸弹、要运行代码，或有稀疏、重叠的张量。
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(Settings, name) for name in _SETTINGS_NAMES]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch 抛的种类很多（UnpicklingError、RuntimeError、RecursionError……），都是坏文件。
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise ValueError(
            f"{path}: not a plain file of weights ({type(error).__name__}: {reason}); "
            "nothing in it was run"
        ) from None
    _check_tensors(data, path)
    return data


def load_tensors(paths: list[Path]) -> LoadedTensors:
    """一个或几个分片的 state_dict 合成一套。

    Raises:
        ValueError: 见 load_pickle；不是 state_dict，或同一个名字在两个分片里。
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in tensors_of(load_pickle(path), str(path)).items():
            if name in found:
                raise ValueError(f"{path}: tensor {name!r} is in another shard too")
            found[name] = tensor
    return LoadedTensors(str(paths[0] if len(paths) == 1 else paths[0].parent), found)


def load_plain(path: Path) -> Any:
    """只有数、文字与它们的表的 pickle（nanoGPT 的 meta.pkl）；别的操作码在解开之前拒绝。

    Raises:
        ValueError: 太大、坏了，或要的不止数与文字。
    """
    if path.stat().st_size > _MAX_PICKLE_BYTES:
        raise ValueError(
            f"{path} has more than {_MAX_PICKLE_BYTES:,} bytes: no table of characters"
        )
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # 备忘的下标直接定出要多大的表。
            far = "PUT" in opcode.name and int(argument or 0) > len(data)
            if far or not _PLAIN_OPCODES.fullmatch(opcode.name):
                raise ValueError(f"{opcode.name} is no part of a table of numbers and texts")
        return _Plain(io.BytesIO(data)).load()
    except Exception as error:
        # 坏的 pickle 抛什么的都有，都是坏文件。
        raise ValueError(
            f"{path}: not a plain pickle of numbers and texts ({error}); nothing in it was run"
        ) from None


def tensors_of(data: Any, where: str) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: 不是名字到张量的映射。
    """
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in data.items()
    ):
        raise ValueError(f"{where}: not a mapping of names to tensors")
    return data


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no zip archive: only files that torch.save writes since PyTorch 1.6 are "
            "read, older pickles never"
        )
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: the archive is broken: {error}") from None
    total = sum(entry.file_size for entry in entries)
    if total > size + _SLACK_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes but unpacks to {total:,}: torch.save never compresses, "
            "so this is refused"
        )
    for entry in entries:
        if entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(
                f"{path}: its pickle has {entry.file_size:,} bytes, more than {_MAX_PICKLE_BYTES:,}"
            )


def _check_tensors(data: Any, path: Path) -> None:
    """张量占的字节之和不超过文件：稀疏的、自相重叠的都会在用到时变得极大。"""
    total, count = 0, 0
    stack, visited = [data], set()
    while stack:
        item = stack.pop()
        # 自己套自己、或一层引用上一层两次的表，走一遍就够。
        if isinstance(item, dict | list | tuple | set):
            if id(item) not in visited:
                visited.add(id(item))
                stack.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, Tensor):
            count += 1
            if item.layout != torch.strided:
                raise ValueError(f"{path}: holds a {item.layout} tensor, only dense ones are read")
            if item.numel() * item.itemsize > item.untyped_storage().nbytes():
                raise ValueError(
                    f"{path}: a tensor of shape {tuple(item.shape)} and strides {item.stride()} is "
                    "larger than what is stored: it repeats values, and only plain ones are read"
                )
            total += item.numel() * item.itemsize
    # 共享的张量（头与嵌入）各算一次，所以容许两倍。
    if total > 2 * path.stat().st_size + _SLACK_BYTES:
        raise ValueError(
            f"{path}: its {count} tensors need {total:,} bytes, more than the file holds"
        )

"""流过 rank 0 写成的文件：与一个进程写的逐字节相同，各取所需地读回；盘满时大家得到同样的错误。"""

from __future__ import annotations

import errno
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from app.distributed.comm import Ranks
from app.distributed.storage import files
from app.distributed.storage.files import Stream, read_rows
from app.distributed.storage.pieces import Box, Part, part_of
from app.models.transformer.weights.safetensors_file import write_tensors_file

from . import models  # noqa: F401  fork 之前导入慢的那些
from .ranks import run_ranks


def tensors() -> dict[str, Tensor]:
    """名字里有引号与汉字，几种类型，标量，空的，奇数行。"""
    random = torch.Generator().manual_seed(0)
    return {
        "h.0.w": torch.randn(97, 24, generator=random),
        "h.10.w": torch.randn(5, 3, 2, generator=random),
        "h.2.w": torch.randn(1, generator=random),
        'b"字': torch.randn(7, generator=random).double(),
        "step": torch.tensor(3.0),
        "half": torch.randn(4, 4, generator=random).bfloat16(),
        "float16": torch.randn(3, generator=random).half(),
        "count": torch.arange(5),
        "codes": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "signed": torch.arange(3, dtype=torch.int8),
        "flag": torch.tensor([True, False]),
    }


def held(size: int) -> dict[str, Part]:
    """浮点的按行切（FSDP2），其余各 rank 都有。"""
    ranks, mesh = Ranks.world(), init_device_mesh("cpu", (size,))
    table = {}
    for name, x in tensors().items():
        if x.ndim and x.is_floating_point():
            x = distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
        table[name] = part_of(x, first=ranks.rank == 0)
    return table


def cut_by_hand(whole: Tensor, rank: int) -> Part:
    """两个 rank 的张量并行：前两部分按行各切一半（如 q、k），第三部分按列切。"""
    a, b, c = whole.split([4, 2, 2])
    rows = torch.cat([a.chunk(2)[rank], b.chunk(2)[rank]])
    columns = c.chunk(2, 1)[rank]
    mine = torch.zeros(len(rows) + len(c), whole.shape[1])
    mine[: len(rows)] = rows
    mine[len(rows) :, : columns.shape[1]] = columns
    boxes = (
        Box(2 * rank, 2, 0),
        Box(4 + rank, 1, 2),
        Box(6, 2, 3, columns.shape[1] * rank, columns.shape[1], 0),
    )
    return Part(mine, tuple(whole.shape), boxes, boxes)


def write(folder: Path, size: int) -> dict[str, Any]:
    ranks = Ranks.world()
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    cut = {"cut": cut_by_hand(whole, ranks.rank)} if size == 2 else {}
    stream = Stream({"all": held(size), "cut": cut}, ranks)

    def fill() -> list[str]:
        try:
            return [stream.write(name, folder / name) for name in ("all", "cut")]
        finally:
            stream.close()

    shas = ranks.first(fill, stream.serve)
    again = {
        name: Part(torch.zeros_like(p.held), p.shape, p.boxes, p.wanted)
        for name, p in held(size).items()
    }
    read_rows(folder / "all", again)
    same = all(torch.equal(again[name].held, part.held) for name, part in held(size).items())
    if cut:
        empty = Part(torch.zeros_like(cut["cut"].held), (8, 6), cut["cut"].boxes, cut["cut"].wanted)
        read_rows(folder / "cut", {"cut": empty})
        same = same and torch.equal(empty.held, cut["cut"].held)
    return {"sha": shas, "same": same}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [64, files.CHUNK])
def test_the_file_is_that_of_one_process(
    size: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """每次 64 字节：一个张量要分很多次，行比一次还宽的也有。"""
    monkeypatch.setattr(files, "CHUNK", chunk)
    write_tensors_file(tensors(), tmp_path / "library")
    want = hashlib.sha256((tmp_path / "library").read_bytes()).hexdigest()
    if size == 1:
        table = {name: part_of(x, first=True) for name, x in tensors().items()}
        assert Stream({"all": table}, Ranks()).write("all", tmp_path / "all") == want
    else:
        for found in run_ranks(size, write, tmp_path, size):
            assert found["sha"][0] == want and found["same"]
    assert (tmp_path / "all").read_bytes() == (tmp_path / "library").read_bytes()
    assert (tmp_path / "all").stat().st_mode == (tmp_path / "library").stat().st_mode


def full_disk(folder: Path, limits: list[int]) -> list[tuple[str, float]]:
    """盘在第 limit 个字节满：各 rank 得到的错误与用的时间，之后还能通信。"""
    found, ranks = [], Ranks.world()
    big = {"w": torch.randn(4000, 64), "v": torch.randn(300, 64)}
    mesh = init_device_mesh("cpu", (ranks.size,))
    table = {
        name: part_of(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None), first=False)
        for name, x in big.items()
    }
    for limit in limits:
        begin = time.monotonic()
        stream = Stream({"w": table}, ranks)

        def fill(limit: int = limit, stream: Stream = stream) -> str:
            try:
                return stream.write("w", Small(folder / "w", limit))
            finally:
                stream.close()

        try:
            ranks.first(fill, stream.serve)
            said = "no error"
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        found.append((said, time.monotonic() - begin))
        ranks.sum(torch.ones(1))
    return found


class Small(type(Path())):  # type: ignore[misc]
    """盘只有 limit 个字节的路径。"""

    def __new__(cls, path: Path, limit: int) -> Small:
        self = super().__new__(cls, path)
        self.limit = limit
        return self

    def open(self, mode: str) -> Any:
        if self.limit < 0:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return SmallFile(Path(self).open(mode), self.limit)


class SmallFile:
    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)

    def close(self) -> None:
        self.file.close()


def check_full_disk(folder: Path, limits: list[int]) -> None:
    found = run_ranks(2, full_disk, folder, limits)
    for limit, *said in zip(limits, *found, strict=True):
        (one, _), (other, _) = said
        assert one == other, limit
        word = "Permission denied" if limit < 0 else "No space left on device"
        assert one.startswith("OSError") and word in one and "cannot be written" in one


def test_a_full_disk_is_the_same_error_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 1 << 14)
    check_full_disk(tmp_path, [-1, 0, 300_000])


@pytest.mark.slow
def test_a_full_disk_at_many_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 1 << 12)
    check_full_disk(tmp_path, [*range(-1, 1_100_000, 37_003)])


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_tensors_file({"w": torch.zeros(3, 2)}, tmp_path / "w")
    part = part_of(torch.zeros(3, 3), first=True)
    with pytest.raises(ValueError, match=r"w is torch.float32 \(3, 2\).*\(3, 3\)"):
        read_rows(tmp_path / "w", {"w": part})
    with pytest.raises(ValueError, match="lacks 1 tensors, such as v"):
        read_rows(tmp_path / "w", {"v": part})

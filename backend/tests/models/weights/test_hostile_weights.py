"""坏的权重文件：每一种都由我们自己的错误点名拒绝，不占多少内存。"""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from app.models.transformer import GPT2Model
from app.models.transformer.weights.own_folder import check_shapes, expected_shapes
from app.models.transformer.weights.safetensors_file import SafetensorsFiles

from ..helpers import tiny_config, tiny_model
from .hostile import ATTACKS, FILE


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny_model(torch.float32).save_pretrained(folder)
    return folder


def copy(good: Path, folder: Path) -> Path:
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 29


@pytest.mark.parametrize("name", ATTACKS)
def test_structural_attacks(name: str, good: Path, tmp_path: Path) -> None:
    folder = copy(good, tmp_path)
    ATTACKS[name](folder / FILE)
    tracemalloc.start()
    with pytest.raises(ValueError, match=FILE):
        GPT2Model.from_pretrained(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_a_shard_that_lies_about_another(good: Path, tmp_path: Path) -> None:
    """同一个名字在两个分片里；索引指到文件夹之外。"""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (a, b):
        path.write_bytes((good / FILE).read_bytes())
    with pytest.raises(ValueError, match="is in another shard too"):
        SafetensorsFiles([a, b])


def fuzz(good: Path, tmp_path: Path, rounds: int) -> tuple[int, int]:
    """改头里的几个字节：要么我们的错误，要么读出完全相同的张量。返回 (拒绝, 相同)。"""
    config = tiny_config()
    expected = expected_shapes(GPT2Model, config)
    original = SafetensorsFiles([good / FILE])
    want = {name: original.read(name) for name in expected}
    data = (good / FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path, rng = tmp_path / FILE, random.Random(0)
    refused = same = 0
    for _ in range(rounds):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(8 + length)] = rng.choice((rng.randrange(256), *b'0129,:[]{}"FB'))
        path.write_bytes(changed)
        try:
            source = SafetensorsFiles([path])
            check_shapes(source, expected, config)
            got = {name: source.read(name) for name in expected}
        except ValueError:
            refused += 1
            continue
        assert all(torch.equal(got[name], want[name]) for name in expected)
        same += 1
    return refused, same


def test_2000_random_headers(good: Path, tmp_path: Path) -> None:
    refused, same = fuzz(good, tmp_path, 2000)
    assert refused > 1800 and same > 0


@pytest.mark.slow
def test_20000_random_headers(good: Path, tmp_path: Path) -> None:
    assert sum(fuzz(good, tmp_path, 20_000)) == 20_000


def test_memory_is_one_model_and_one_tensor(tmp_path: Path) -> None:
    """逐个读、逐个换精度：峰值不是两份模型。量 Python 之外的内存，所以另起进程。"""
    import subprocess
    import sys

    model = tiny_model(torch.float32, n_embed=512, n_layer=4, vocab_size=4000, norm="pre")
    model.save_pretrained(tmp_path)
    size = model.num_parameters() * 4
    biggest = max(p.numel() for p in model.parameters()) * 4
    code = f"""
import json, resource, torch
from app.models.transformer import GPT2Model
GPT2Model.from_pretrained({str(good_small(tmp_path))!r})
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = GPT2Model.from_pretrained({str(tmp_path)!r})
print(json.dumps(peak() - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < size + 4 * biggest < 2 * size


def good_small(tmp_path: Path) -> Path:
    """先读一个小的：导入与库的缓冲不算在内。"""
    tiny_model(torch.float32, norm="pre").save_pretrained(tmp_path / "small")
    return tmp_path / "small"

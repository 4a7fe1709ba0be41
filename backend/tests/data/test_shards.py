"""数据集文件夹：跨分片读取、文档编号、坏文件在打开时点名。"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.sampler import Sampler
from app.data.shards import TokenDataset, shard_name, token_dtype
from app.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from app.data.writer import NEW, ShardWriter


def write(
    folder: Path, documents: list[bytes], shard_tokens: int = 7, tokenizer: Tokenizer | None = None
) -> TokenDataset:
    writer = ShardWriter(folder, tokenizer or ByteTokenizer(), shard_tokens, NEW)
    for document in documents:
        tokens = np.frombuffer(document, np.uint8).astype(np.uint32)
        writer.add(tokens, len(document), end=True)
    writer.finish({"description": "test"})
    return TokenDataset.open(folder, verify="sha256")


def flat(documents: list[bytes]) -> tuple[list[int], list[int]]:
    tokens = [t for d in documents for t in [*d, 256]]
    segments = [i for i, d in enumerate(documents) for _ in range(len(d) + 1)]
    return tokens, segments


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.binary(max_size=20), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 30),
    data=st.data(),
)
def test_read_and_segments(
    documents: list[bytes],
    shard_tokens: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    dataset = write(tmp_path_factory.mktemp("d"), documents, shard_tokens)
    tokens, segments = flat(documents)
    assert dataset.n_tokens == len(tokens)
    assert len(dataset.meta["files"]) == -(-len(tokens) // shard_tokens) + 1
    start = data.draw(st.integers(0, len(tokens)))
    length = data.draw(st.integers(0, len(tokens) - start))
    assert dataset.read(start, length).tolist() == tokens[start : start + length]
    assert dataset.segments(start, length).tolist() == segments[start : start + length]
    assert dataset.read(0, 1).dtype == dataset.segments(0, 1).dtype == np.int64
    assert [segments.index(i) for i in range(len(documents))] == dataset.document_starts.tolist()


def test_dtype_by_vocabulary() -> None:
    assert [token_dtype(n).name for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_large_vocabulary_is_stored_as_uint32(tmp_path: Path) -> None:
    tokenizer = CharTokenizer(chr(i) for i in [*range(0x20, 0xD800), *range(0xE000, 0x12000)])
    assert tokenizer.vocab_size > 65536
    writer = ShardWriter(tmp_path, tokenizer, 100, NEW)
    text = "a\U00011fffz"
    writer.add(tokenizer.encode_batch([text])[0], len(text.encode()), end=True)
    writer.finish({})
    dataset = TokenDataset.open(tmp_path, "sha256")
    ids = dataset.read(0, 4).tolist()
    assert ids[-1] == dataset.tokenizer().document_separator > 65535
    assert dataset.tokenizer().decode(ids[:3]) == text


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [b"one", b"two"])
    same = write(tmp_path / "b", [b"one", b"two"])
    other = write(tmp_path / "c", [b"one", b"twp"])
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_sampler_reads_a_dataset(tmp_path: Path) -> None:
    documents = [bytes(range(i, i + 25)) for i in range(10)]
    dataset = write(tmp_path, documents)
    tokens, _ = flat(documents)
    sampler = Sampler(dataset.n_tokens, 12, 3, seed=0)
    inputs, targets = sampler.batch(dataset, 4)
    for row, start in enumerate(sampler.offsets(4)):
        assert inputs[row].tolist() == tokens[start : start + 12]
        assert targets[row].tolist() == tokens[start + 1 : start + 13]


def edit_meta(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    return damage


def bytes_of(name: str, change: Callable[[bytearray], bytearray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = change(bytearray((folder / name).read_bytes()))
        (folder / name).write_bytes(bytes(data))

    return damage


def put(position: int, value: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[position] = value
        return data

    return change


def short_index(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([0], dtype=np.int64))


def unsorted_index(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([0, 14, 7], dtype=np.int64))


def float_index(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([0, 7, 14], dtype=np.float64))


def pickled_index(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([0, 7, "x"], dtype=object), allow_pickle=True)


def fix_size(damage: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    """损坏之后让 meta.json 里的大小相符：要由内容的检查来发现。"""

    def both(folder: Path) -> None:
        damage(folder)
        size = (folder / name).stat().st_size

        def change(meta: dict[str, Any]) -> None:
            next(f for f in meta["files"] if f["name"] == name)["bytes"] = size

        edit_meta(change)(folder)

    return both


FIRST = shard_name(0)
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("no meta", lambda f: (f / "meta.json").unlink(), "no meta.json there"),
    ("meta cut", bytes_of("meta.json", lambda d: d[:50]), "not valid JSON"),
    ("meta list", lambda f: (f / "meta.json").write_text("[1]"), "expected a mapping, got list"),
    ("version", edit_meta(lambda m: m.update(schema_version=99)), "schema_version=99"),
    ("kind", edit_meta(lambda m: m.update(schema_version=2)), "kind=.text. with schema_version=2"),
    ("dtype", edit_meta(lambda m: m.update(dtype="uint32")), "dtype='uint32', but"),
    ("count", edit_meta(lambda m: m.update(n_tokens=19)), "n_tokens=19, but .* hold 21"),
    ("negative", edit_meta(lambda m: m.update(n_tokens=-1)), "n_tokens=-1"),
    ("documents", edit_meta(lambda m: m.update(n_documents=4)), "says 4 documents"),
    ("no vocab", edit_meta(lambda m: m.update(tokenizer=None)), "tokenizer.vocab_size=None"),
    ("escape", edit_meta(lambda m: m["files"][0].update(name="../x")), "files are .*expected"),
    ("missing file", lambda f: (f / FIRST).unlink(), f"{FIRST}: the file is missing"),
    ("cut", bytes_of(FIRST, lambda d: d[:-2]), f"{FIRST}: 18 bytes, but meta.json says 20"),
    ("empty", bytes_of(FIRST, lambda d: bytearray()), f"{FIRST}: 0 bytes"),
    ("odd", fix_size(bytes_of(FIRST, lambda d: d[:-1]), FIRST), "19 bytes, not a multiple of 2"),
    ("index magic", bytes_of("index.npy", put(0, 0)), "index.npy: not a NumPy index"),
    ("index short", fix_size(short_index, "index.npy"), "index.npy: 1 documents"),
    ("index order", fix_size(unsorted_index, "index.npy"), "document starts must grow"),
    ("index float", fix_size(float_index, "index.npy"), "float64 .* expected int64 with 1"),
    ("index pickle", fix_size(pickled_index, "index.npy"), "not a NumPy index"),
]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write(tmp_path / "good", [b"abcdef", b"ghijkl", b"mnopqr"], shard_tokens=10)
    return tmp_path / "good"


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_named_when_opening(
    damage: Callable[[Path], None], message: str, good: Path
) -> None:
    damage(good)
    with pytest.raises(ValueError, match=message):
        TokenDataset.open(good)


def test_changed_content_is_found_by_sha256(good: Path) -> None:
    bytes_of(FIRST, put(4, ord("x")))(good)
    TokenDataset.open(good)
    with pytest.raises(ValueError, match=f"{FIRST}: the sha256 differs"):
        TokenDataset.open(good, verify="sha256")


def test_ids_outside_the_vocabulary(good: Path) -> None:
    """一致地写坏（sha256 也相符）：sha256 模式在打开时发现，size 模式在读到时发现。"""
    bytes_of(FIRST, put(5, 0xFF))(good)
    from app.common.files import sha256_file

    def resign(meta: dict[str, Any]) -> None:
        meta["files"][0]["sha256"] = sha256_file(good / FIRST)

    edit_meta(resign)(good)
    with pytest.raises(ValueError, match=f"{FIRST}: token id 65379 is outside .* 257"):
        TokenDataset.open(good, verify="sha256")
    dataset = TokenDataset.open(good)
    assert len(dataset.read(3, 18)) == 18
    with pytest.raises(ValueError, match="token id 65379 at tokens 0 to 4"):
        dataset.read(0, 5)


def test_foreign_tokenizer_is_refused(good: Path) -> None:
    CharTokenizer("abc").save(good)
    with pytest.raises(ValueError, match="restore the tokenizer files"):
        TokenDataset.open(good).tokenizer()


def test_wrong_use_is_named(good: Path, tmp_path: Path) -> None:
    dataset = TokenDataset.open(good)
    for start, length in ((-1, 2), (0, 22), (21, 1), (0, -1)):
        with pytest.raises(ValueError, match="outside the dataset's 21 tokens"):
            dataset.read(start, length)
        with pytest.raises(ValueError, match="outside the dataset's 21 tokens"):
            dataset.segments(start, length)
    with pytest.raises(ValueError, match="no such dataset folder"):
        TokenDataset.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="verify='md5'"):
        TokenDataset.open(good, verify="md5")  # type: ignore[arg-type]
    shutil.copytree(good, tmp_path / "out" / "train")
    with pytest.raises(ValueError, match=r"open .*out.train"):
        TokenDataset.open(tmp_path / "out")


def test_writer_refuses_foreign_ids(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, ByteTokenizer(), 10, NEW)
    with pytest.raises(ValueError, match="token id 300 is outside .* 257"):
        writer.add(np.array([300], dtype=np.uint32), 1, end=True)
    writer.close()


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_writer_goes_on_from_any_checkpoint(cut: int, tmp_path: Path) -> None:
    """记下状态之后又写了许多（乃至收了尾），退回去重写，逐字节相同。"""
    pieces = [(np.array([i % 256, (i * 7) % 256], dtype=np.uint32), i % 3 == 2) for i in range(42)]

    def add(writer: ShardWriter, part: list[tuple[np.ndarray, bool]]) -> None:
        for tokens, end in part:
            writer.add(tokens, len(tokens), end)

    whole = ShardWriter(tmp_path / "whole", ByteTokenizer(), 9, NEW)
    add(whole, pieces)
    whole.finish({})
    broken = ShardWriter(tmp_path / "broken", ByteTokenizer(), 9, NEW)
    add(broken, pieces[:cut])
    state = broken.checkpoint()
    add(broken, pieces[cut:])
    if cut % 2:
        broken.finish({})
    else:
        broken.close()
    again = ShardWriter(tmp_path / "broken", ByteTokenizer(), 9, state)
    add(again, pieces[cut:])
    again.finish({})
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "broken").iterdir()} == files


def test_writer_refuses_a_shortened_part(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, ByteTokenizer(), 10, NEW)
    writer.add(np.array([1, 2, 3], dtype=np.uint32), 3, end=False)
    state = writer.checkpoint()
    writer.close()
    (tmp_path / (FIRST + ".tmp")).write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes, but 6 had been written"):
        ShardWriter(tmp_path, ByteTokenizer(), 10, state)

"""分词器：往返精确、特殊文本注入、坏文件点名、流式解码。"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data import byte_level
from app.data.tokenizers import (
    META_FILE,
    TABLE_FILE,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    chars_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)

SHARED = Path(__file__).parents[4] / "shared" / "data"
EOT = "<|endoftext|>"
CORPUS = [
    "def f(x):\n    return x + 1  # naïve café, 中文 and 日本\r\n" * 20,
    "the quick brown fox jumps over the lazy dog; it's 2026 and we'll see\n" * 20,
    "    indented    text\n\n\n\t\ttabs " * 20 + EOT,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([EOT, "<|", "|>", "endoftext", " ", "\n", "\r\n", "a", "é", "中", "😀", "'ll"])
).map("".join)


@pytest.fixture(scope="session")
def bpe() -> BPETokenizer:
    return train_bpe(CORPUS, 340)


@pytest.fixture(scope="session")
def gpt2() -> BPETokenizer:
    if not (SHARED / "gpt2_vocab.bpe").is_file():
        pytest.skip(f"no GPT-2 vocabulary files in {SHARED}")
    return gpt2_tokenizer(SHARED)


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.document_separator not in ids
    assert tokenizer.byte_length([*ids, tokenizer.document_separator]) == len(text.encode())
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == text


@settings(deadline=None)
@given(TEXT)
def test_bytes_round_trip(text: str) -> None:
    check_round_trip(ByteTokenizer(), text)


@settings(deadline=None)
@given(TEXT)
def test_chars_round_trip(text: str) -> None:
    check_round_trip(chars_tokenizer([text, EOT]), text)


@settings(deadline=None)
@given(text=TEXT)
def test_bpe_round_trip(bpe: BPETokenizer, text: str) -> None:
    check_round_trip(bpe, text)


@settings(max_examples=50, deadline=None)
@given(text=TEXT)
def test_gpt2_round_trip(gpt2: BPETokenizer, text: str) -> None:
    check_round_trip(gpt2, text)


def test_published_gpt2_encodings(gpt2: BPETokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.document_separator) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello world") == [18435, 995]
    assert gpt2.encode("GPT2 inference runtime in C++ and CUDA") == [
        38, 11571, 17, 32278, 19124, 287, 327, 4880, 290, 29369, 5631,
    ]  # fmt: skip
    assert gpt2.encode("The dog") == [464, 3290]
    assert gpt2.decode([50256]) == EOT


def test_gpt2_equals_tiktoken_on_real_text(gpt2: BPETokenizer) -> None:
    """tiktoken 自己读同样的文件，用自己的切分规则。"""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(
        str(SHARED / "gpt2_vocab.bpe"), str(SHARED / "gpt2_encoder.json")
    )
    theirs = tiktoken.Encoding("x", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    text = (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8")
    source = Path(byte_level.__file__).read_text(encoding="utf-8")
    for sample in (text, source, *CORPUS, "   x   ", "\n\n a", "x's 'S 123abc ² ½"):
        assert gpt2.encode(sample) == theirs.encode_ordinary(sample)


def test_tokenizer_json_opens_elsewhere(bpe: BPETokenizer, tmp_path: Path) -> None:
    """Hugging Face tokenizers 打开同一个文件，除特殊文本外编码相同。"""
    from tokenizers import Tokenizer as HubTokenizer

    bpe.save(tmp_path)
    theirs = HubTokenizer.from_file(str(tmp_path / TABLE_FILE))
    text = "".join(CORPUS[:2]) + "unseen wörds 🙂 \u00a0 \x1c end  "
    assert theirs.encode(text).ids == bpe.encode(text)
    assert theirs.decode(bpe.encode(text)) == text
    assert theirs.token_to_id(EOT) == bpe.document_separator


def test_unknown_character_is_named() -> None:
    tokenizer = CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) is not in the tokenizer"):
        tokenizer.encode("abé")
    with pytest.raises(ValueError, match=r"U\+1F600"):
        tokenizer.encode("😀")


def test_chars_order_does_not_depend_on_the_corpus_order() -> None:
    first, second = chars_tokenizer(["cab", "z"]), chars_tokenizer(["z", "bac"])
    assert first.fingerprint() == second.fingerprint()
    assert first.encode("abcz") == [0, 1, 2, 3]


def test_training_is_deterministic(bpe: BPETokenizer) -> None:
    assert train_bpe(CORPUS, 340).fingerprint() == bpe.fingerprint()
    assert bpe.vocab_size == 340


def test_small_corpus_gives_a_smaller_vocabulary() -> None:
    tokenizer = train_bpe(["abab"], 1000)
    assert 257 < tokenizer.vocab_size < 1000
    with pytest.raises(ValueError, match="257"):
        train_bpe(["abab"], 256)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_lone_surrogate_is_refused(kind: str, bpe: BPETokenizer) -> None:
    tokenizer = {"bytes": ByteTokenizer(), "chars": CharTokenizer("a"), "bpe": bpe}[kind]
    with pytest.raises(ValueError, match=r"U\+D800"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("token", [-1, 257])
def test_id_outside_is_named(token: int) -> None:
    with pytest.raises(ValueError, match=f"{token} is outside .* 257"):
        ByteTokenizer().decode([token])


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 256)), cuts=st.lists(st.integers(0, 40)))
def test_stream_decoder_equals_decode(ids: list[int], cuts: list[int]) -> None:
    """也包括坏的 UTF-8：任意字节，任意分批。"""
    tokenizer, stream = ByteTokenizer(), StreamDecoder(ByteTokenizer())
    borders = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_stream_decoder_holds_half_a_character_back() -> None:
    stream = StreamDecoder(ByteTokenizer())
    first, *rest = "中".encode()
    assert stream.push([first]) == ""
    assert stream.push(rest) == "中"
    assert stream.push([first]) + stream.finish() == "\ufffd"


def test_very_long_runs_of_spaces(bpe: BPETokenizer) -> None:
    """再长的空白也不能让进程中止（tiktoken 的正则在约一百万个空格处溢出）。"""
    run = byte_level.MAX_SPACE_RUN
    for text in (" " * 1_200_000 + "x", "a" + "\n " * run + "b" + " " * (run + 1) + "c"):
        assert bpe.decode(bpe.encode(text)) == text
    edge = "a" + " " * run + "b"
    assert list(byte_level.split_long_spaces(edge)) == [edge]


def test_training_sees_no_endless_word() -> None:
    """训练的代价是词长的平方：送进训练器的任何一段空白或非空白都有上限。"""
    size = byte_level.MAX_TRAINING_RUN
    text = "word " + "a" * (3 * size + 1) + " " * (2 * size) + "中" * size + "\n"
    parts = list(byte_level._split_runs(text, byte_level._LONG_RUNS, size))
    assert "".join(parts) == text
    assert max(len(run) for part in parts for run in re.findall(r"\s+|\S+", part)) == size
    assert train_bpe(["a" * 300_000], 260).vocab_size == 260


def test_encode_batch_equals_encode(bpe: BPETokenizer) -> None:
    for tokenizer in (ByteTokenizer(), chars_tokenizer(CORPUS), bpe):
        batch = tokenizer.encode_batch([*CORPUS, ""])
        assert [b.tolist() for b in batch] == [tokenizer.encode(t) for t in [*CORPUS, ""]]
        assert all(b.dtype == np.uint32 for b in batch)


def test_save_and_load(bpe: BPETokenizer, tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), chars_tokenizer(CORPUS), bpe):
        folder = tmp_path / tokenizer.kind
        tokenizer.save(folder)
        loaded = load_tokenizer(folder)
        assert loaded.kind == tokenizer.kind
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_all_names_of_the_vocabulary_files(gpt2: BPETokenizer, tmp_path: Path) -> None:
    for merges, vocab in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")):
        folder = tmp_path / merges
        folder.mkdir()
        (folder / merges).write_bytes((SHARED / "gpt2_vocab.bpe").read_bytes())
        (folder / vocab).write_bytes((SHARED / "gpt2_encoder.json").read_bytes())
        assert gpt2_tokenizer(folder).fingerprint() == gpt2.fingerprint()
    with pytest.raises(ValueError, match=r"vocab\.bpe \+ encoder\.json"):
        gpt2_tokenizer(tmp_path)


def test_failed_download_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken.load

    def fail(*_: Any) -> bytes:
        raise OSError("no route")

    monkeypatch.setattr(tiktoken.load, "read_file_cached", fail)
    with pytest.raises(ValueError, match="--vocab-files"):
        gpt2_tokenizer()


def edited(folder: Path, change: Any) -> Path:
    """改 tokenizer.json 的内容，并让 sha256 与之相符：只剩内容本身的错。"""
    data = json.loads((folder / TABLE_FILE).read_text(encoding="utf-8"))
    change(data)
    text = json.dumps(data)
    (folder / TABLE_FILE).write_text(text, encoding="utf-8")
    return resign(folder, text.encode())


def resign(folder: Path, data: bytes) -> Path:
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    meta["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    return folder


def _missing_merge(data: Any) -> None:
    del data["model"]["merges"][10]


def _all_merges(data: Any) -> None:
    del data["model"]["merges"]


def _duplicate_id(data: Any) -> None:
    data["model"]["vocab"]["a"] = data["model"]["vocab"]["b"]


def _id_too_large(data: Any) -> None:
    data["model"]["vocab"]["a"] = 1_000_000


def _negative_id(data: Any) -> None:
    data["model"]["vocab"]["a"] = -1


def _missing_byte(data: Any) -> None:
    vocab = data["model"]["vocab"]
    vocab["~~~~"] = vocab.pop("~")


def _swapped_ids(data: Any) -> None:
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    first, second = (m.replace(" ", "") for m in (merges[3], merges[9]))
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _foreign_character(data: Any) -> None:
    vocab = data["model"]["vocab"]
    vocab["中"] = vocab.pop("~")


def _three_part_merge(data: Any) -> None:
    data["model"]["merges"][0] = "a b c"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing_merge, "no merge makes the token|which is not in the vocabulary"),
        (_all_merges, "no model.vocab and model.merges"),
        (_duplicate_id, "stands for both"),
        (_id_too_large, "id 1000000, outside a vocabulary"),
        (_negative_id, "id -1, outside"),
        (_missing_byte, "byte 0x7E has no token"),
        (_swapped_ids, "must follow the order of the merges"),
        (_foreign_character, "not one of the 256"),
        (_three_part_merge, "expected two tokens"),
    ],
)
def test_bad_vocabulary_is_named(
    change: Any, message: str, bpe: BPETokenizer, tmp_path: Path
) -> None:
    bpe.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(edited(tmp_path, change))


def test_damaged_files_are_named(bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    table, meta = tmp_path / TABLE_FILE, tmp_path / META_FILE
    good_table, good_meta = table.read_bytes(), meta.read_text(encoding="utf-8")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
        table.write_bytes(good_table)
        meta.write_text(good_meta, encoding="utf-8")

    table.write_bytes(good_table[: len(good_table) // 2])
    refused("sha256 differs")
    flipped = bytearray(good_table)
    flipped[100] ^= 1
    table.write_bytes(bytes(flipped))
    refused("sha256 differs")
    half = good_table[: len(good_table) // 2]
    table.write_bytes(half)
    resign(tmp_path, half)
    refused("not valid JSON")
    twice = good_table.replace(b'"version": "1.0",', b'"version": "1.0", "version": "1.0",')
    table.write_bytes(twice)
    resign(tmp_path, twice)
    refused("'version' appears twice")
    for key, value, message in (
        ("vocab_size", 10**9, "vocab_size=1000000000 must be between"),
        ("vocab_size", 341, "vocab_size is 340, but"),
        ("document_separator", 340, "document_separator=340 must be an id below"),
        ("kind", "pickle", "kind='pickle'"),
        ("schema_version", 99, "schema_version=99"),
    ):
        # 只改一处；separator 在 399，随 vocab_size 变小也须先过范围检查
        changed = {**json.loads(good_meta), key: value}
        if value == 399:
            changed["document_separator"] = 398
        meta.write_text(json.dumps(changed), encoding="utf-8")
        refused(message)
    meta.unlink()
    refused("not a tokenizer folder")


def test_absurd_size_is_refused_before_reading(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    with open(tmp_path / TABLE_FILE, "r+b") as file:
        file.truncate(2**30)  # 稀疏文件，不占磁盘
    with pytest.raises(ValueError, match="too large"):
        load_tokenizer(tmp_path)

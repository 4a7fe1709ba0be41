"""来源与切分：坏文件点名、切段不改变编码、验证集精确而确定。"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data import split
from app.data.reading import plain_text, records
from app.data.reading import sources as sources_module
from app.data.reading.corpus import stdlib_excluded, stdlib_sources
from app.data.reading.plain_text import NotTextError, read_text
from app.data.reading.records import read_jsonl
from app.data.reading.sources import Reading, Sources
from app.data.split import Census, survey, units
from app.data.tokenizers import train_bpe


def texts(sources: Sources) -> list[str]:
    return ["".join(d.pieces()) for d in sources.documents()]


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def side_texts(sources: Sources, fraction: float) -> dict[str, list[str]]:
    plan, census = survey(sources, fraction, alphabet=False), Census()
    result: dict[str, list[str]] = {side: [""] for side in plan.sides}
    for unit in units(sources, plan, census):
        result[unit.side][-1] += unit.text
        if unit.end:
            result[unit.side].append("")
    assert census.content() == plan.content
    return {side: parts[:-1] for side, parts in result.items()}


def test_folder_is_recursive_sorted_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/z.md", "sub/a.TXT", "pic.png", "code.py"):
        put(tmp_path / name, name)
    put(tmp_path / "pic.png", b"\x89PNG\0")
    plan = survey(Sources([tmp_path]), 0.0, alphabet=False)
    assert list(plan.skipped) == [str(tmp_path / "pic.png")] and plan.content["documents"] == 5
    wanted = ["a.txt", "b.txt", "sub/a.TXT", "sub/z.md"]
    assert texts(Sources([tmp_path], Reading(suffixes=(".txt", ".MD")))) == wanted
    assert texts(Sources([tmp_path], Reading(suffixes=(".py",)))) == ["code.py"]
    with pytest.raises(ValueError, match=r"no files with the suffixes \.rst; there are .*\.txt: 3"):
        texts(Sources([tmp_path], Reading(suffixes=(".rst",))))
    with pytest.raises(ValueError, match="use '.py'"):
        Reading(suffixes=("py",))


def test_folder_order_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{folder}/{name}.txt" for folder in "abcd" for name in "xyz"]
    for name in names:
        put(tmp_path / name, name)
    walk = os.walk

    def shuffled(root: Path, **options: Any) -> Any:
        for folder, folders, files in walk(root, **options):
            folders.sort(reverse=True)
            yield folder, folders, files[::-1]

    monkeypatch.setattr(sources_module.os, "walk", shuffled)
    assert texts(Sources([tmp_path])) == names


def test_missing_and_no_sources() -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        Sources(["nowhere"])
    with pytest.raises(ValueError, match="no sources"):
        Sources([])


def test_text_is_kept_exactly(tmp_path: Path) -> None:
    text = "one\ufeff\r\ntwo\rthree\n\n\t中文😀\x1c\u2028end"
    assert texts(Sources([put(tmp_path / "a.txt", text)])) == [text]


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_reading_does_not_depend_on_blocks(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = put(tmp_path_factory.mktemp("t") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "_READ_BYTES", 3)
        assert "".join(read_text(path)) == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc\0def", "NUL byte at 3"),
        (b"abcd\xff\xfe", "invalid start byte at byte 4"),
        ("é".encode("latin-1") + b"abcdefgh", "invalid continuation byte at byte 0"),
        (b"abcdef" + "中".encode()[:2], "unexpected end of data at byte 6"),
        ("hi".encode("utf-16"), "(NUL byte at 3|invalid start byte at byte 0)"),
    ],
)
def test_binary_is_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    path = put(tmp_path / "junk.txt", data)
    for block in (1 << 20, 3, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain_text, "_READ_BYTES", block)
            with pytest.raises(NotTextError, match=rf"junk\.txt: not UTF-8 text \({message}"):
                list(read_text(path))
    with pytest.raises(NotTextError, match=r"junk\.txt"):
        survey(Sources([path]), 0.1, alphabet=False)


def test_binary_in_a_folder_is_skipped_whole(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "good text " * 10)
    put(tmp_path / "b.txt", b"x" * 3_000_000 + b"\0")
    put(tmp_path / "c.txt", "")
    sources = Sources([tmp_path])
    plan = survey(sources, 0.0, alphabet=True)
    assert list(plan.skipped) == [str(tmp_path / "b.txt")]
    assert (plan.content["documents"], plan.content["bytes"], plan.empty) == (1, 100, 1)
    assert "x" in plan.alphabet  # "text" 里的 x
    assert plan.alphabet == frozenset("good text")
    assert side_texts(sources, 0.0) == {"train": ["good text " * 10]}


def test_jsonl(tmp_path: Path) -> None:
    lines = [{"text": "one\nline"}, {"text": "中\u2028", "id": 3}, {"text": ""}]
    path = put(tmp_path / "a.jsonl", "\n\n".join(json.dumps(x) for x in lines))
    assert texts(Sources([path])) == ["one\nline", "中\u2028", ""]
    path = put(tmp_path / "b.jsonl", json.dumps({"body": "x"}) + "\r\n")
    assert list(read_jsonl(path, "body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "expected an object, got list"),
        (b'{"body": "x"}', r"no key 'text' \(keys: 'body'\): choose with --text-key"),
        (b'{"text": 3}', "'text' is int, expected a text"),
        (b'{"text": null}', "'text' is NoneType"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (rb'{"text": "\ud800"}', r"lone surrogate U\+D800"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    """也在文件夹里：jsonl 的坏行从不悄悄略过。"""
    put(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match=rf"a\.jsonl line 3: .*{message}"):
            survey(Sources([source]), 0.1, alphabet=False)


def test_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    path = put(tmp_path / "a.jsonl", '{"text": "' + "x" * 200 + '"}')
    with pytest.raises(ValueError, match="line 1: longer than 100 bytes"):
        list(read_jsonl(path, "text"))


def test_parquet(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", b"PAR1")
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        with pytest.raises(ImportError, match="needs the package pyarrow"):
            texts(Sources([path]))
        return
    parquet.write_table(arrow.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert texts(Sources([path])) == ["one", "two"]
    with pytest.raises(ValueError, match="no column 'body'"):
        texts(Sources([path], Reading(text_key="body")))


CUTTABLE = st.text(st.sampled_from("ab \n\t\x1c\u00a0é中'1."), min_size=1, max_size=300)


@settings(max_examples=150, deadline=None)
@given(text=CUTTABLE, size=st.integers(1, 50), block=st.integers(1, 70))
def test_packing_depends_on_the_text_alone(text: str, size: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "UNIT_CHARS", size)
        blocks = [text[i : i + block] for i in range(0, len(text), block)]
        packed = list(split._pack("train", blocks))
        assert packed == list(split._pack("train", [text]))
    assert "".join(u.text for u in packed) == text
    assert [u.end for u in packed] == [False] * (len(packed) - 1) + [True]
    assert all(0 < len(u.text) <= size for u in packed)


TOKENIZER = train_bpe(["ab aab bba\n\n  1.1 'a é中 " * 50, " \t\n \n\n  \n" * 50], 330)


@settings(max_examples=150, deadline=None)
@given(text=CUTTABLE)
def test_cut_text_encodes_as_the_whole(text: str) -> None:
    """凡有安全切口，分段编码与整篇相同。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "UNIT_CHARS", 40)
        parts = [u.text for u in split._pack("train", [text])]
    borders = [len("".join(parts[:i])) for i in range(1, len(parts))]
    if all(not text[b - 1].isspace() and text[b] in " \n" for b in borders):
        assert [i for p in parts for i in TOKENIZER.encode(p)] == TOKENIZER.encode(text)


def test_safe_cuts_are_found_in_ordinary_text() -> None:
    text = "some words here\n" * 100_000
    parts = [u.text for u in split._pack("train", [text])]
    assert len(parts) == -(-len(text) // split.UNIT_CHARS)
    assert all(p[0] in " \n" for p in parts[1:])
    assert [i for p in parts for i in TOKENIZER.encode(p)] == TOKENIZER.encode(text)


@pytest.mark.parametrize("n", [2, 10, 11, 99, 1000])
def test_one_document_gives_its_tail(n: int, tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(n))
    got = side_texts(Sources([put(tmp_path / "a.txt", text)]), 0.1)
    assert got == {"train": [text[: int(n * 0.9)]], "val": [text[int(n * 0.9) :]]}


def test_tail_crosses_documents(tmp_path: Path) -> None:
    """三篇相同的文档：哈希分不开，取全部文本的末尾。"""
    for name in "abc":
        put(tmp_path / f"{name}.txt", "0123456789")
    got = side_texts(Sources([tmp_path]), 0.5)
    assert got == {"train": ["0123456789", "01234"], "val": ["56789", "0123456789"]}


def test_hash_split(tmp_path: Path) -> None:
    """许多文档：份额相近，与次序无关，重复的文档同在一边。"""
    lines = [json.dumps({"text": f"document number {i % 900}"}) for i in range(1000)]
    got = side_texts(Sources([put(tmp_path / "a.jsonl", "\n".join(lines))]), 0.1)
    back = side_texts(Sources([put(tmp_path / "b.jsonl", "\n".join(lines[::-1]))]), 0.1)
    assert len(got["train"]) + len(got["val"]) == 1000
    assert 60 < len(got["val"]) < 140
    assert not set(got["train"]) & set(got["val"])
    assert got["val"] == back["val"][::-1]


def test_no_validation_set(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "text")
    assert side_texts(Sources([path]), 0.0) == {"train": ["text"]}


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_fraction(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_fraction="):
        survey(Sources([put(tmp_path / "a.txt", "text")]), fraction, alphabet=False)


def test_nothing_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text there"):
        survey(Sources([put(tmp_path / "a.txt", "")]), 0.1, alphabet=False)
    with pytest.raises(ValueError, match="1 characters are too few"):
        survey(Sources([put(tmp_path / "a.txt", "x")]), 0.1, alphabet=False)


def test_standard_library() -> None:
    """本机的标准库：没有第三方包、没有测试，全是文本，两遍相同。"""
    first, second = (survey(stdlib_sources(), 0.1, alphabet=False) for _ in range(2))
    assert first.content == second.content
    assert first.content["bytes"] > 5_000_000
    assert first.split == "hash"
    names = [d.name.replace("\\", "/") for d in stdlib_sources().documents()]
    assert any(n.endswith("/dataclasses.py") for n in names)
    assert not [n for n in names if "/site-packages/" in n or "/test/" in n]


@pytest.mark.parametrize(
    ("path", "excluded"),
    [
        ("site-packages", True),
        ("idlelib/idle_test", True),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", True),
        ("config-3.11-x86_64-linux-gnu", True),
        ("configparser.py", False),
        ("sysconfig.py", False),
        ("unittest", False),
    ],
)
def test_what_the_corpus_leaves_out(path: str, excluded: bool) -> None:
    assert stdlib_excluded(path) is excluded

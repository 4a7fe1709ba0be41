"""读文件：json、csv、tsv、parquet、按行、按分隔文字；没读的说得出来，坏的点名到行。"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.reading import plain_text, records
from app.data.reading.plain_text import NotTextError, lines, read_text, split_at
from app.data.reading.records import read_json, read_jsonl
from app.data.reading.sources import Reading, Sources
from app.data.reading.tables import read_csv, read_parquet
from app.data.split import survey

MARK = "\ufeff"
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def texts(sources: Sources) -> list[str]:
    return ["".join(d.pieces()) for d in sources.documents()]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "one"),
        ("a.jsonl", '{"text": "one"}'),
        ("a.json", '["one"]'),
        ("a.csv", "text\none\n"),
        ("a.tsv", "text\tid\none\t1\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(name: str, data: str, tmp_path: Path) -> None:
    assert texts(Sources([put(tmp_path / name, MARK + data)])) == ["one"]


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.text(st.sampled_from("ab<|e \n"), max_size=12), max_size=6),
    separator=st.sampled_from(["<|end|>", "\n\n", "|", "ab"]),
    size=st.integers(1, 9),
)
def test_splitting_equals_str_split(documents: list[str], separator: str, size: int) -> None:
    whole = separator.join(documents)
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    wanted = whole.split(separator)
    if wanted[-1] == "":
        wanted.pop()
    found: Counter[str] = Counter()
    got = ["".join(part()) for part in split_at(iter(pieces), separator, found)]
    assert got == wanted
    assert found[separator] == whole.count(separator)
    # 没读完就取下一篇
    assert sum(1 for _ in split_at(iter(pieces), separator, Counter())) == len(wanted)


def test_a_line_a_document(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "one\r\n\ntwo\rthree\n\u2028four")
    assert list(lines(read_text(path))) == ["one", "", "two\rthree", "\u2028four"]
    plan = survey(Sources([path], Reading(document_per_line=True)), 0.0, alphabet=False)
    assert (plan.content["documents"], plan.empty) == (3, 1)


def test_binary_in_a_folder_is_skipped_whole_when_split(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "one\ntwo")
    put(tmp_path / "b.txt", b"good\ngood\n\xff")
    sources = Sources([tmp_path], Reading(document_per_line=True))
    plan = survey(sources, 0.0, alphabet=False)
    assert (plan.content["documents"], list(plan.skipped)) == (2, [str(tmp_path / "b.txt")])
    with pytest.raises(NotTextError, match=r"b\.txt: not UTF-8 text .* at byte 10\)"):
        survey(Sources([tmp_path / "b.txt"], Reading(document_per_line=True)), 0.0, alphabet=False)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(PLAIN, max_size=5), indent=st.sampled_from([None, 2]), block=st.integers(1, 9)
)
def test_json_array_and_lines(
    values: list[str], indent: int | None, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("j")
    mixed: list[Any] = [{"text": v, "n": [1, {"text": "x"}]} if len(v) % 2 else v for v in values]
    array = put(folder / "a.json", json.dumps(mixed, indent=indent))
    rows = "\n".join(json.dumps({"text": v}, indent=indent) for v in values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "_READ_BYTES", block)
        assert list(read_json(array, "text")) == values
        assert list(read_json(put(folder / "b.json", rows), "text")) == values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('["a",\n"b"', r"item 2: not valid JSON \(no comma or \] after it, near line 2"),
        ("[ ", "the array does not end"),
        ('["a",\n{"text": }]', r"item 2 \(line 2\): not valid JSON"),
        ('["a" "b"]', "item 1: not valid JSON .no comma"),
        ('["a",]', "nothing after the comma"),
        ('["a"] x', "text after the end of the array"),
        ("[1]", r"item 1 \(line 1\): expected an object, got int"),
        ('{"data": []}', r"no key 'text' \(keys: 'data'\): choose with --text-key"),
        ('[{"text": null}]', "'text' is NoneType, expected a text"),
        (r'["\ud800"]', r"lone surrogate U\+D800"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json_is_named(data: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        list(read_json(put(tmp_path / "a.json", data), "text"))


CELL = st.text(st.sampled_from('ab"\n,;\t é'), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(CELL, CELL), max_size=5),
    delimiter=st.sampled_from([",", ";", "\t"]),
    block=st.integers(1, 9),
)
def test_csv_comes_back(
    rows: list[tuple[str, str]],
    delimiter: str,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([("id", "body"), *rows])
    folder = tmp_path_factory.mktemp("c")
    path = put(folder / ("a.tsv" if delimiter == "\t" else "a.csv"), stream.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "_READ_BYTES", block)
        assert list(read_csv(path, "body")) == [body for _, body in rows]


def test_a_csv_is_not_one_document_with_header_and_quotes(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", 'text,label\n"one, ""two""\nthree",1\n\nfour,0\n')
    assert texts(Sources([path])) == ['one, "two"\nthree', "four"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a,b\n1,2\n", r"a\.csv: no column 'text' in its first line \(columns: 'a', 'b'\)"),
        ("text,b\nx,1\ny,2,3\n", r"row 2 \(line 3\): 3 fields, but the first line names 2"),
        ('text,b\n"x\n\ny",1\nz\n', r"row 2 \(line 5\): 1 fields"),
        ('text,b\n"x,1\n', "line 2: .*is a double quote missing"),
        ("", "no column 'text'"),
        ("text,text\na,b\n", "2 columns are named 'text': rename one"),
        ("text,b\rx,1\r", "line ends not those of Unix or Windows"),
    ],
)
def test_bad_csv_is_named(data: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_csv(put(tmp_path / "a.csv", data), "text"))


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    """标准库默认只许 131072 个字符。"""
    before = csv.field_size_limit()
    path = put(tmp_path / "a.csv", "text,b\n" + "x" * 200_000 + ",1\n")
    assert [len(text) for text in read_csv(path, "text")] == [200_000]
    assert csv.field_size_limit() == before


def test_parquet_errors_name_the_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    many = ["x"] * 150
    parquet.write_table(arrow.table({"text": [*many, None]}), path)
    with pytest.raises(
        ValueError, match=r"a\.parquet row 151: 'text' is NoneType, expected a text"
    ):
        list(read_parquet(path, "text"))
    parquet.write_table(arrow.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet row 1: 'text' is int"):
        list(read_parquet(path, "text"))
    raw = arrow.array([b"ok", b"\xff"], type=arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": raw}), path)
    with pytest.raises(ValueError, match=r"a\.parquet row 2: 'text' is not UTF-8"):
        list(read_parquet(path, "text"))
    parquet.write_table(arrow.table({"text": many}), path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"PAR1", b"", whole[:20] + b"\xff" * 30 + whole[50:]):
        with pytest.raises(ValueError, match=r"a\.parquet: not readable as parquet"):
            list(read_parquet(put(path, data), "text"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "héllo".encode("utf-16"), r"looks like UTF-16: .*iconv -f UTF-16"),
        ("a.txt", b"caf\xe9 au lait", r"at byte 3\): convert it to UTF-8 \(`iconv -f LATIN1"),
        ("a.txt", b"\x7f\0ELF", "it is binary, or of another encoding"),
        ("a.txt.gz", b"\x1f\x8b\x08\x08", "unpack it first"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1: not UTF-8 .* at byte 10 of the line"),
        ("a.json", b'["\xff"]', "at byte 2"),
        ("a.csv", b"text,b\n\xff,1", "at byte 7"),
    ],
)
def test_other_encodings_are_named_with_the_fix(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    path = put(tmp_path / name, data)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        survey(Sources([path]), 0.0, alphabet=False)


def test_a_folder_tells_what_it_leaves_out(tmp_path: Path) -> None:
    root = tmp_path / "code"
    for number in range(30):
        put(root / f"sub/{number}.py", f"print({number})\n")
    put(root / "README.MD", "read me")
    put(root / "LICENSE", "free")
    put(root / "package.json", "{}")
    put(root / "data.csv", "a,b\n")
    put(root / "old.zip", b"PK")
    put(root / ".git/config", "hidden")
    put(root / ".env", "SECRET")
    put(tmp_path / "far/away.txt", "far")
    (root / "link").symlink_to(tmp_path / "far")
    (root / "broken").symlink_to("nowhere")
    (root / "same.py").symlink_to(root / "sub/0.py")
    said = list(Sources([root]).inventory().lines(False))
    assert said == [
        "to read as plain text, one document a file: 31 .py, 1 without suffix, 1 .md",
        "not read: 1 .csv, 1 .json (name the key of their text with --text-key)",
        "not read: 1 .zip (choose with --suffixes)",
        "not read: 2: .git/, .env (hidden; name them as sources to read them)",
        f"not followed: 1: {root / 'link'} (linked folders; name them as sources)",
        f"not read: 1: {root / 'broken'} (broken links or not regular files)",
        f"read twice: 1: {root / 'sub/0.py'} (the same file again)",
    ]
    assert len(texts(Sources([root]))) == 33
    with_key = Sources([root], Reading(text_key="a")).inventory()
    assert with_key.records == Counter({".csv": 1, ".json": 1})


def test_markers_are_counted_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "_READ_BYTES", 5)
    put(tmp_path / "a.txt", "x<|endoftext|>y<|im_start|><|endoftext|>")
    put(tmp_path / "b.txt", "|> <|>  <s>a</s><s> <|endof")
    put(tmp_path / "c.txt", "text|>")
    plan = survey(Sources([tmp_path]), 0.0, False, markers=["<s>", "</s>"])
    assert plan.markers == Counter({"<|endoftext|>": 2, "<|im_start|>": 1, "<s>": 2, "</s>": 1})


def test_json_lines_named_txt_are_noticed(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", '{"text": "x"}\n{"text": "y"}\n')
    put(tmp_path / "b.txt", "{ not json }\n")
    plan = survey(Sources([tmp_path]), 0.0, False)
    assert plan.raw == [str(tmp_path / "a.txt")]


def test_prepared_data_is_no_source(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "text")
    put(tmp_path / "out/prepare.json", "{}")
    put(tmp_path / "out/train/meta.txt", "ours")
    assert texts(Sources([tmp_path])) == ["text"]
    said = list(Sources([tmp_path]).inventory().lines(False))
    assert said[-1] == f"not read: 1: {tmp_path / 'out'} (prepared data)"
    with pytest.raises(ValueError, match="out is prepared data already: train on it"):
        Sources([tmp_path / "out"])


def test_a_folder_of_hidden_files_says_so(tmp_path: Path) -> None:
    put(tmp_path / ".a.txt", "text")
    with pytest.raises(ValueError, match="no files to read; there are 1 hidden"):
        texts(Sources([tmp_path]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_separator": ""}, "document_separator='' is empty"),
        ({"document_separator": "x", "document_per_line": True}, "two ways to split"),
        ({"suffixes": ("py",)}, "use '.py'"),
    ],
)
def test_reading_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reading(**options)


def test_endless_json_item_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(plain_text, "_READ_BYTES", 50)
    path = put(tmp_path / "a.json", '["' + "x" * 500)
    with pytest.raises(ValueError, match="item 1 .line 1.: not valid JSON .longer than 100"):
        list(read_json(path, "text"))
    assert list(read_jsonl(put(tmp_path / "b.jsonl", '{"text": "x"}'), "text")) == ["x"]

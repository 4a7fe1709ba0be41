"""记录变成对话的数据集：各种写法、改名、坏的记录点名文件与行而什么也不写。"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data.chat.encode import Turn, encode_conversation
from app.data.chat.forms import form_of, parse_columns, renamed
from app.data.chat.prepare import ChatSpec, prepare_examples
from app.data.prepare import TokenizerSpec
from app.data.reading.sources import Reading, Sources
from app.data.shards import TokenDataset
from app.training.objectives.reference import store
from tests.data.helpers import tree


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


MESSAGES = [
    {"messages": [message("user", f"q {i}"), message("assistant", f"a {i}")]} for i in range(40)
]
SAME = {
    "messages": MESSAGES,
    "conversations": [
        {
            "conversations": [
                {"from": "human", "value": f"q {i}"},
                {"from": "gpt", "value": f"a {i}"},
            ]
        }
        for i in range(40)
    ],
    "prompt": [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(40)],
    "instruction": [{"instruction": f"q {i}", "input": "", "output": f"a {i}"} for i in range(40)],
}


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(records), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            rows = csv.DictWriter(file, records[0].keys(), delimiter=delimiter)
            rows.writeheader()
            rows.writerows(records)
    return path


def prepare(source: Path, out: Path, **options: Any) -> dict[str, TokenDataset]:
    columns = parse_columns(options.pop("columns", []))
    sources = Sources([source], Reading(form="records"))
    first = sources.first_record()
    assert first is not None
    where, record = first
    form = form_of(renamed(record, columns, where), options.pop("format", "auto"), where)
    names = ("chat", "context", "long")
    given = {name: options.pop(name) for name in names if name in options}
    spec = ChatSpec(form, columns=columns, **given)
    tokenizer = options.pop("tokenizer", TokenizerSpec("bytes"))
    return prepare_examples(sources, out, tokenizer, spec, **{"say": lambda _: None, **options})


def texts(data: TokenDataset) -> list[tuple[str, str]]:
    """各例的 (全文, 计分的文字)。"""
    tokenizer, starts = data.tokenizer(), [*data.document_starts.tolist(), data.n_tokens]
    result = []
    for start, end in zip(starts, starts[1:], strict=False):
        ids, marks = data.read(start, end - start), data.scored(start, end - start)
        result.append((tokenizer.decode(ids), tokenizer.decode(ids[marks])))
    return result


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_form_in_every_file(form: str, suffix: str, tmp_path: Path) -> None:
    records = SAME[form]
    if suffix in (".csv", ".tsv") and form in ("messages", "conversations"):
        records = [{form: json.dumps(r[form])} for r in records]
    path = write(tmp_path / f"data{suffix}", records)
    sides = prepare(path, tmp_path / "out", chat="chatml")
    reference = prepare(write(tmp_path / "same.jsonl", MESSAGES), tmp_path / "same", chat="chatml")
    assert {side: texts(data) for side, data in sides.items()} == {
        side: texts(data) for side, data in reference.items()
    }
    assert sum(len(data.document_starts) for data in sides.values()) == 40
    assert sides["train"].kind == ("pairs" if form in ("prompt", "instruction") else "chat")
    assert all(
        scored == f"a {full.split('q ')[1].split('<')[0]}<|im_end|>"
        for full, scored in texts(sides["train"])
    )


def test_the_dataset_holds_what_the_encoder_says(tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "a.jsonl", MESSAGES), tmp_path / "out", val_fraction=0)["train"]
    template, tokenizer = data.template(), data.tokenizer()
    assert data.meta["schema_version"] == 2 and template.name == "chatml"
    assert tokenizer.vocab_size == 259
    for i, start in enumerate(data.document_starts.tolist()):
        turns = [Turn("user", f"q {i}"), Turn("assistant", f"a {i}")]
        ids, scored = encode_conversation(turns, template, tokenizer)
        assert data.read(start, len(ids)).tolist() == ids.tolist()
        assert data.scored(start, len(ids)).tolist() == scored.tolist()
    assert TokenDataset.open(data.folder, "sha256").n_scored == data.n_scored
    (data.folder / "chat.json").write_text((data.folder / "chat.json").read_text() + " ")
    data.template()  # 空白不算
    (data.folder / "chat.json").unlink()
    with pytest.raises(ValueError, match=r"restore chat\.json"):
        data.template()


def test_preference_and_its_prompt_written_twice(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "q"}
    records: list[Any] = [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    answer = [[asked, {"role": "assistant", "content": text}] for text in ("good", "bad")]
    records.append({"prompt": "q", "chosen": answer[0], "rejected": answer[1]})
    records.append({"prompt": [asked], "chosen": answer[0][1:], "rejected": answer[1][1:]})
    path = write(tmp_path / "a.jsonl", records)
    data = prepare(path, tmp_path / "out", val_fraction=0)["train"]
    assert data.kind == "preference"
    assert texts(data) == 3 * [
        ("qgood<|endoftext|>", "good<|endoftext|>"),
        ("qbad<|endoftext|>", "bad<|endoftext|>"),
    ]
    # DPO 的训练把参考的对数概率存在数据旁边：不是别人的文件，接着的那条命令也照做
    store(data, "0123abcd", np.zeros(len(data.document_starts)), lambda line: None)
    said: list[str] = []
    prepare(path, tmp_path / "out", val_fraction=0, say=said.append)
    assert "nothing to do" in said[-1]


def test_prompt_messages_are_not_scored(tmp_path: Path) -> None:
    asked = MESSAGES[0]["messages"] + [{"role": "user", "content": "more"}]
    record = {"prompt": asked, "completion": [{"role": "assistant", "content": "yes"}]}
    other = [*asked[:1], {"role": "assistant", "content": "a", "weight": 0}, *asked]
    other = [*other, {"role": "assistant", "content": "yes"}]
    one = prepare(write(tmp_path / "a.jsonl", [record]), tmp_path / "1", val_fraction=0)
    two = prepare(
        write(tmp_path / "b.jsonl", [{"messages": other}]), tmp_path / "2", val_fraction=0
    )
    assert [scored for _, scored in texts(one["train"])] == ["yes<|endoftext|>"]
    assert [scored for _, scored in texts(two["train"])] == ["a 0<|im_end|>yes<|im_end|>"]


def test_columns_rename(tmp_path: Path) -> None:
    records = [{"Frage": f"q {i}", "Antwort": f"a {i}", "id": i} for i in range(5)]
    said: list[str] = []
    columns = ["prompt=Frage,completion=Antwort"]
    path = write(tmp_path / "a.csv", records)
    data = prepare(path, tmp_path / "out", columns=columns, val_fraction=0, say=said.append)[
        "train"
    ]
    assert texts(data)[0] == ("q 0a 0<|endoftext|>", "a 0<|endoftext|>")
    assert "not read: the keys 'id'" in said
    with pytest.raises(ValueError, match=r"a\.csv row 1 .*no key 'frage' \(keys: 'Frage'"):
        prepare(path, tmp_path / "x", columns=["prompt=frage"])
    for wrong in ("prompt", "=x", "prompt=", "prompt=a,prompt=b"):
        with pytest.raises(ValueError, match="--columns"):
            parse_columns([wrong])
    with pytest.raises(ValueError, match="'Frage' is not a key of any form"):
        parse_columns(["Frage=prompt"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("question", "answer"), "add --columns prompt=question,completion=answer"),
        (("Prompt", "response"), "add --columns prompt=Prompt,completion=response"),
        (("dialogue",), "add --columns messages=dialogue"),
        (("body", "id"), "add --columns text=body"),
        (("prompt", "better", "worse"), "--columns chosen=better,rejected=worse"),
        (("mesages",), "add --columns messages=mesages"),
        (("instruction",), "the nearest is"),
        (("x", "y"), r"the forms are text; messages; .*: rename with --columns"),
    ],
)
def test_unknown_keys_name_the_nearest_form(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        form_of(dict.fromkeys(keys, "x"), "auto", "a.jsonl line 1")


def test_a_format_that_is_not_there() -> None:
    record = {"prompt": "x", "completion": "y"}
    with pytest.raises(ValueError, match=r"--format chat, but the keys are those of pairs"):
        form_of(record, "chat", "a.jsonl line 1")
    assert form_of({"text": "x", "messages": []}, "auto", "").kind == "text"
    assert form_of({"text": "x", "messages": []}, "chat", "").kind == "chat"
    assert form_of({"prompt": "x", "completion": None, "messages": []}, "auto", "").kind == "chat"


GOOD = MESSAGES[0]
USER, EMPTY = message("user", "q"), message("assistant", " \n")


def bad(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


BAD: list[tuple[str, Any, str]] = [
    ("empty answer", bad(USER, EMPTY), r"line 2: an answer of the assistant is empty"),
    ("no answer", bad(USER), r"line 2: there is no answer"),
    ("nothing scored", bad(USER, {**EMPTY, "weight": 0}), r"line 2: there is no answer"),
    ("content", bad(message("user", None)), r"line 2: 'messages' item 1: 'content' is NoneType"),
    ("role", bad(message("tool", "x"), *GOOD["messages"]), r"line 2: role 'tool'"),
    ("lost", bad({**USER, "tool_calls": []}), r"line 2: .*'tool_calls' would be lost"),
    ("weight", bad({**USER, "weight": 0.5}), r"weight=0\.5"),
    (
        "lost in the other form",
        {"conversations": [{"from": "human", "value": "q", "tool": 1}]},
        r"line 2: .*'tool' would be lost \(from, value and weight are read\)",
    ),
    ("not a list", {"messages": "hello"}, r"line 2: 'messages' is a text, expected a list"),
    ("other form", {"prompt": "a", "completion": "b"}, r"line 2: no 'messages' \(keys: 'prompt'"),
]


@pytest.mark.parametrize(("record", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_records_are_named_and_nothing_is_written(
    record: Any, message: str, tmp_path: Path
) -> None:
    first = SAME["conversations"][0] if "conversations" in record else GOOD
    path, out = write(tmp_path / "a.jsonl", [first, record]), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        prepare(path, out, val_fraction=0)
    assert not out.exists() or not [p for p in out.rglob("*") if p.name != "prepare.lock"]
    # 改好之后同一个文件夹可以再用
    prepare(write(path, [GOOD, GOOD]), out, val_fraction=0)


def test_more_bad_data(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "same", "rejected": "same"}
    with pytest.raises(ValueError, match=r"line 1: 'chosen' and 'rejected' are equal"):
        prepare(write(tmp_path / "a.jsonl", [pair]), tmp_path / "1")
    ragged = tmp_path / "b.csv"
    ragged.write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(ValueError, match=r"b\.csv row 2 \(line 3\): 3 fields"):
        prepare(ragged, tmp_path / "2")
    answers = [{"messages": [{"role": "assistant", "content": "only me"}]}]
    with pytest.raises(ValueError, match="hold nothing but answers"):
        prepare(write(tmp_path / "c.jsonl", answers), tmp_path / "3", val_fraction=0)
    twice = tmp_path / "d.csv"
    twice.write_text("prompt,completion,completion\na,b,c\n")
    with pytest.raises(ValueError, match=r"2 columns are named 'completion'"):
        prepare(twice, tmp_path / "4")
    with pytest.raises(ValueError, match="--long cut-prompt needs to know how long"):
        prepare(write(tmp_path / "e.jsonl", MESSAGES), tmp_path / "5", long="cut-prompt")


def test_overlong_examples_are_counted(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 100}, GOOD["messages"][1]]}
    path, said = write(tmp_path / "a.jsonl", [*MESSAGES[:10], long]), list[str]()
    options: dict[str, Any] = {"val_fraction": 0, "context": 60, "say": said.append}
    data = prepare(path, tmp_path / "1", **options)["train"]
    assert len(data.document_starts) == 10
    assert any(s.startswith("warning: train: 1 of 11 examples are longer") for s in said)
    cut = prepare(path, tmp_path / "2", long="cut-prompt", **options)["train"]
    assert len(cut.document_starts) == 11
    full, scored = texts(cut)[-1]
    assert scored == "a 0<|im_end|>" and cut.n_tokens - cut.document_starts[-1] == 61
    assert "train: 1 examples were cut at their front to fit 60" in said
    with pytest.raises(ValueError, match="none of the 11 examples of train fits in context=5"):
        prepare(path, tmp_path / "3", **{**options, "context": 5})
    assert not (tmp_path / "3" / "train").exists()


def test_again_and_another_command(tmp_path: Path) -> None:
    path, out, said = write(tmp_path / "a.jsonl", MESSAGES), tmp_path / "out", list[str]()
    prepare(path, out)
    before = tree(out)
    prepare(path, out, say=said.append)
    assert tree(out) == before and "nothing to do" in said[-1]
    with pytest.raises(ValueError, match="belongs to another `gpt2 prepare`"):
        prepare(path, out, chat="plain")
    # 没做完的从头再写
    journal = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps({**journal, "finished": False}))
    (out / "train" / "tokens-00000.bin").write_bytes(b"half")
    (out / "val" / "meta.json").unlink()
    prepare(path, out)
    assert {k: v for k, v in tree(out).items() if k != "prepare.json"} == {
        k: v for k, v in before.items() if k != "prepare.json"
    }


def test_validation_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", MESSAGES)
    held = Sources([write(tmp_path / "v.jsonl", MESSAGES[:3])], Reading(form="records"))
    said: list[str] = []
    sides = prepare(path, tmp_path / "1", val=held, val_fraction=0, say=said.append)
    assert [len(sides[s].document_starts) for s in ("train", "val")] == [40, 3]
    assert any("3 examples are in both" in line for line in said)
    small = prepare(write(tmp_path / "b.jsonl", MESSAGES[:4]), tmp_path / "2", val_fraction=0.25)
    assert [len(small[s].document_starts) for s in ("train", "val")] == [3, 1]
    # 次序变了，同一条仍在同一边
    turned = prepare(write(tmp_path / "c.jsonl", MESSAGES[::-1]), tmp_path / "3", val_fraction=0.3)
    straight = prepare(path, tmp_path / "4", val_fraction=0.3)
    assert sorted(texts(turned["val"])) == sorted(texts(straight["val"]))
    # 同样的记录，a 从验证挪到训练：不是同一条命令
    moved = write(tmp_path / "e.jsonl", MESSAGES[:3] + MESSAGES)
    with pytest.raises(ValueError, match="val_examples was 3 and is now None"):
        prepare(moved, tmp_path / "1", val_fraction=0)
    with pytest.raises(ValueError, match="too few to hold out"):
        prepare(write(tmp_path / "d.jsonl", MESSAGES[:1]), tmp_path / "5")


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_tokenizers_made_from_records(kind: str, tmp_path: Path) -> None:
    spec = TokenizerSpec(kind, 300 if kind == "bpe" else None)
    path = write(tmp_path / "a.jsonl", MESSAGES)
    data = prepare(path, tmp_path / "out", tokenizer=spec, val_fraction=0)["train"]
    assert texts(data)[7][1] == "a 7<|im_end|>"


def test_a_weight_of_nothing_in_the_other_form(tmp_path: Path) -> None:
    turns = [*SAME["conversations"][0]["conversations"], {"from": "gpt", "value": "b"}]
    turns[1] = {**turns[1], "weight": 0}
    path = write(tmp_path / "a.jsonl", [{"conversations": turns}])
    assert texts(prepare(path, tmp_path / "out", val_fraction=0)["train"])[0][1] == "b<|im_end|>"


def test_a_folder_of_records(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", MESSAGES[:20])
    # 空的文件什么形式也不说
    write(folder / "0.jsonl", [])
    write(folder / "b.json", MESSAGES[20:])
    (folder / "readme.txt").write_text("not a conversation")
    data = prepare(folder, tmp_path / "out", val_fraction=0)["train"]
    assert len(data.document_starts) == 40
    with pytest.raises(ValueError, match=r"readme\.txt: conversations are read from \.jsonl"):
        list(Sources([folder / "readme.txt"], Reading(form="records")).records())

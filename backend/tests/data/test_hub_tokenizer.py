"""外来的 tokenizer.json：id 与 AutoTokenizer 相同，特殊文本仍是文本，存读、续段、流式。"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Hub

from app.data.hub_tokenizer import HubTokenizer
from app.data.token_table import META_FILE, StreamDecoder
from app.data.tokenizers import load_tokenizer

CORPUS = ["the quick brown fox's jumps, over 12 lazy dogs\n naïve café 中文 <s> </s>"] * 30
EDGES = [
    " ",
    "  ",
    "\n",
    "the",
    " dog",
    "é",
    "中",
    "😀",
    "</s>",
    "<s>",
    "<eos>",
    "newword",
    "[SEP]",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.lists(
    st.sampled_from(EDGES), max_size=12
).map("".join)


def _trained(model: Any, trainer: Any, **parts: Any) -> Hub:
    hub = Hub(model)
    for name, part in parts.items():
        setattr(hub, name, part)
    hub.train_from_iterator(CORPUS, trainer)
    return hub


def byte_level(prefix: bool) -> Hub:
    """GPT-2 的样子，另有添加的词元。"""
    hub = _trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoder=decoders.ByteLevel(),
    )  # fmt: skip
    hub.add_special_tokens(["<eos>"])
    hub.add_tokens([AddedToken("newword"), AddedToken("naïve")])
    return hub


def metaspace(scheme: str) -> Hub:
    """Llama 的样子：`▁`、字节退路、句首 `<s>`。"""
    hub = _trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", "<s>", "<eos>", *(f"<0x{b:02X}>" for b in range(256))],
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )
    hub.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", hub.token_to_id("<s>"))]
    )
    return hub


def unigram() -> Hub:
    return _trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<eos>", "</s>", "<unk>"], unk_token="<unk>",
            show_progress=False,
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )  # fmt: skip


def word_piece() -> Hub:
    hub = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]", "<eos>"],
            show_progress=False,
        ),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )  # fmt: skip
    hub.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(t, hub.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return hub


MAKERS = {
    "byte level": lambda: byte_level(False),
    "prefix space": lambda: byte_level(True),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "unigram": unigram,
    "word piece": word_piece,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def pair(request: pytest.FixtureRequest) -> tuple[Hub, HubTokenizer]:
    hub = MAKERS[request.param]()
    return hub, HubTokenizer(hub.to_str(), hub.token_to_id("<eos>"))


def auto(hub: Hub, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    hub.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_equal_auto_tokenizer(pair: tuple[Hub, HubTokenizer], tmp_path: Path) -> None:
    """随机文本，写着特殊词元的也算；提示的 id 与默认的相同，只少了补在末尾的。"""
    hub, ours = pair
    theirs, random_text = auto(hub, tmp_path), random.Random(0)
    special = {i for t, i in ours.special_tokens.items() if t not in ("<unk>", "[UNK]")}
    start, mistaken = list(ours.start_ids), 0
    n_end = hub.num_special_tokens_to_add(False) - len(start)
    texts = [
        "".join(
            random_text.choice([*EDGES, *"abcxyz .,'!09-\t"])
            for _ in range(random_text.randrange(1, 12))
        )
        for _ in range(10_000)
    ]
    plain = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    whole = theirs(texts, split_special_tokens=True)["input_ids"]
    encoded = ours.encode_batch(texts)
    for text, wanted, prompt, ids in zip(texts, plain, whole, encoded, strict=True):
        if not special.isdisjoint(wanted):  # Unigram 的词表里直接有 </s>：那边写成了特殊词元
            mistaken += 1
            continue
        assert ids.tolist() == wanted, text
        assert prompt[: len(prompt) - n_end] == [*start, *wanted]
        if wanted:
            assert ours.encode_prompt(text) == [*start, *wanted]
    assert mistaken == 0 or '"Unigram"' in hub.to_str()


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_text_never_becomes_a_special_token(pair: tuple[Hub, HubTokenizer], text: str) -> None:
    _, ours = pair
    unknown = {i for t, i in ours.special_tokens.items() if t in ("<unk>", "[UNK]")}
    ids = ours.encode(text)
    assert not set(ids) & (set(ours.special_tokens.values()) - unknown)
    assert ours.encode_batch([text, ""])[0].tolist() == ids
    stream = StreamDecoder(ours)
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == ours.decode(ids)


@settings(max_examples=100, deadline=None)
@given(left=st.sampled_from(["the", "x1", "café", "newword", "."]), text=TEXT)
def test_a_continued_part_encodes_as_within_the_whole(
    pair: tuple[Hub, HubTokenizer], left: str, text: str
) -> None:
    """切口在非空白与空格之间：两段的 id 相接等于整篇的。"""
    _, ours = pair
    right = " " + text
    assert ours.encode(left) + ours.encode_continued([right])[0].tolist() == ours.encode(
        left + right
    )


def test_a_part_that_merges_with_the_letter_before_it() -> None:
    """词表里有 `▁as`：垫一个 a 再切掉，会丢了 s；换一个字垫。"""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), *((c, -3.0) for c in "▁a0.s<>x"), ("▁as", -0.5)]
    hub = Hub(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    hub.pre_tokenizer = pre_tokenizers.Metaspace()
    hub.decoder = decoders.Metaspace()
    hub.add_special_tokens(["<s>"])
    ours = HubTokenizer(hub.to_str(), None)
    names = [ours.names[i] for i in ours.encode_continued(["sx"])[0].tolist()]
    assert names == ["s", "x"]
    assert ours.decode(ours.encode("x<s>")).strip() == "x<s>"


@pytest.mark.parametrize("name", ["byte level", "prefix space", "metaspace first"])
def test_lossless_kinds_come_back(name: str) -> None:
    hub = MAKERS[name]()
    ours = HubTokenizer(hub.to_str(), hub.token_to_id("<eos>"))
    text = "the naïve newword 中文 😀 <eos> x"
    ids = ours.encode(text)
    assert ours.decode(ids).removeprefix(" ") == text
    assert ours.byte_length([*ids, ours.document_separator]) == len(ours.decode(ids).encode())


def test_save_and_load(pair: tuple[Hub, HubTokenizer], tmp_path: Path) -> None:
    hub, ours = pair
    ours.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == hub.to_str()
    assert isinstance(loaded, HubTokenizer)
    assert loaded.fingerprint() == ours.fingerprint()
    assert loaded.encode(CORPUS[0]) == ours.encode(CORPUS[0])
    for name in ("document_separator", "stop_ids", "start_ids", "vocab_size"):
        assert getattr(loaded, name) == getattr(ours, name)


def test_start_stop_and_separator(tmp_path: Path) -> None:
    hub = metaspace("first")
    end, start = hub.token_to_id("<eos>"), hub.token_to_id("<s>")
    ours = HubTokenizer(hub.to_str(), end, stop_ids=[end, 0])
    assert (ours.start_ids, ours.document_start, ours.boundary_id) == ((start,), (start,), start)
    assert ours.stop_ids == (end, 0)
    assert ours.encode_prompt("") == [start] and ours.encode_prompt("dog")[0] == start
    # OPT：开头的就是分隔符，文档之间已经有它
    same = HubTokenizer(hub.to_str(), start)
    assert (same.start_ids, same.document_start) == ((start,), ())
    none = HubTokenizer(byte_level(False).to_str(), None)
    assert (none.document_separator, none.stop_ids, none.start_ids) == (None, (), ())
    assert none.decode([none.boundary_id]) == "\n"
    none.save(tmp_path)
    assert load_tokenizer(tmp_path).document_separator is None
    assert len({t.fingerprint() for t in (ours, same, none)}) == 3


def test_holes_in_the_ids_are_counted() -> None:
    data = json.loads(byte_level(False).to_str())
    data["added_tokens"][-1]["id"] = 400
    ours = HubTokenizer(json.dumps(data), None)
    top = max(ours.encode("naïve"))
    assert ours.vocab_size == top + 1


@pytest.mark.parametrize(
    ("text", "separator", "message"),
    [
        ("{", None, "not valid JSON"),
        ("{}", None, "the tokenizers package cannot read it"),
        ("[1]", None, "the tokenizers package cannot read it"),
        ("GOOD", 9999, "the separator 9999 is not one of its"),
        ("DROPOUT", None, r"model\.dropout=0\.1 makes the encoding random"),
    ],
)
def test_refusals(text: str, separator: int | None, message: str) -> None:
    good = byte_level(False).to_str()
    data = json.loads(good)
    data["model"]["dropout"] = 0.1
    given_text = {"GOOD": good, "DROPOUT": json.dumps(data)}.get(text, text)
    with pytest.raises(ValueError, match=f"t.json: {message}"):
        HubTokenizer(given_text, separator, source="t.json")


def test_a_stop_id_outside_is_named_when_read(tmp_path: Path) -> None:
    HubTokenizer(byte_level(False).to_str(), None).save(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text(encoding="utf-8"))
    (tmp_path / META_FILE).write_text(json.dumps({**meta, "stop_ids": [10**6]}), encoding="utf-8")
    with pytest.raises(ValueError, match="stop_ids=1000000 must be an id below"):
        load_tokenizer(tmp_path)

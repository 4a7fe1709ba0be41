"""分词器与 Hugging Face 的文件互换：tokenizer.json、tokenizer_config.json、vocab.json、merges.txt。

只读写 JSON 与文本；聊天模板、自带代码的分词器类一概不看，更不运行。
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.data import byte_level
from app.data.byte_level import SEPARATOR_TEXT, parse_json, read_limited
from app.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)

PAD_TEXT = "<|pad|>"
# 任何一个字符，含换行；tokenizers 的正则引擎不认 (?s:.)。
_ANY = r"[\s\S]"


@dataclass(frozen=True)
class SpecialIds:
    """end 结束一篇文档，也用作开头；pad 是另一个 id，从不被掩码之外的东西认出。"""

    end: int
    pad: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """填充的 id 是词表之后的第一个：模型的词表更大就借它一行空的，否则补一行。"""
    return SpecialIds(_end(tokenizer), tokenizer.vocab_size)


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.document_separator is None:
        raise ValueError(
            f"a {tokenizer.kind} tokenizer of {tokenizer.vocab_size} ids without a document "
            "separator has no end-of-text token to write"
        )
    return tokenizer.document_separator


def hub_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json 的内容：id 与 tokenizer 的逐一相同，另有一个填充符。"""
    data = _without_pad(tokenizer)
    pad = _special(special_ids(tokenizer).pad, pad_text(tokenizer))
    return {**data, "added_tokens": [*data["added_tokens"], pad]}


def pad_text(tokenizer: Tokenizer) -> str:
    """填充符的文字；训练语料里真有这个词元（极少）则加号数，直到不同。"""
    taken = set(_without_pad(tokenizer)["model"]["vocab"])
    text, number = PAD_TEXT, 1
    while text in taken:
        number += 1
        text = f"<|pad_{number}|>"
    return text


def _without_pad(tokenizer: Tokenizer) -> dict[str, Any]:
    match tokenizer:
        case BPETokenizer():
            return tokenizer.to_json()
        case ByteTokenizer():
            vocab = {byte_level.to_chars(bytes([b])): b for b in range(256)}
            return byte_level.hub_json(vocab, [], tokenizer.document_separator)
        case CharTokenizer():
            return _characters(tokenizer)
    raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json")


def _characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    characters = tokenizer.to_json()["characters"]
    end = _end(tokenizer)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(end, SEPARATOR_TEXT)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": _ANY}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {**{c: i for i, c in enumerate(characters)}, SEPARATOR_TEXT: end},
            # 表外的字符在这里也是错，不悄悄换成别的；库要求有个名字。
            "unk_token": "<unk>",
        },
    }  # fmt: skip


def _special(number: int, text: str) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **plain, "special": True}


def tokenizer_files(tokenizer: Tokenizer, context_size: int) -> dict[str, str]:
    """{文件名: 内容}。字节级 BPE 另有 vocab.json 与 merges.txt，给只认得它们的工具。"""
    table = hub_tokenizer(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_size,
        "bos_token": SEPARATOR_TEXT,
        "eos_token": SEPARATOR_TEXT,
        "unk_token": SEPARATOR_TEXT,
        "pad_token": pad_text(tokenizer),
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": json.dumps(table, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    model = table["model"]
    if model["type"] == "BPE":
        files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False) + "\n"
        files["merges.txt"] = "\n".join(["#version: 0.2", *model["merges"], ""])
    return files


def read_hub_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2 的字节级 BPE（两个词表文件或 tokenizer.json），或本模块写出的字符表。

    Raises:
        ValueError: 没有分词器文件，坏了，或是这里没有的一种（点名是哪一种）。
    """
    pairs = byte_level.VOCAB_FILE_NAMES
    if any(all((folder / name).is_file() for name in pair) for pair in pairs):
        return BPETokenizer("gpt2", *byte_level.read_vocab_files(folder))
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json")
    data = parse_json(read_limited(path), str(path))
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict):
        raise ValueError(f"{path}: no model.vocab there")
    if model.get("type") == "WordLevel":
        return _read_characters(vocab, str(path))
    return _read_bpe(data, model, vocab, str(path))


def _read_characters(vocab: dict[str, Any], source: str) -> Tokenizer:
    characters = sorted(c for c in vocab if c != SEPARATOR_TEXT)
    if not characters or any(len(c) != 1 for c in characters):
        raise ValueError(f"{source}: a WordLevel vocabulary of words, only characters can be read")
    tokenizer = CharTokenizer(characters)
    expected = _without_pad(tokenizer)["model"]["vocab"]
    if vocab != expected:
        raise ValueError(f"{source}: the ids are not those of the sorted characters")
    return tokenizer


def _read_bpe(
    data: dict[str, Any], model: dict[str, Any], vocab: dict[str, Any], source: str
) -> Tokenizer:
    plain = {
        "model.type": (model.get("type"), "BPE"),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or None, None),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or None, None),
        "normalizer": (data.get("normalizer"), None),
        "pre_tokenizer": (_kind(data.get("pre_tokenizer")), "ByteLevel"),
    }
    for name, (given, wanted) in plain.items():
        if given != wanted:
            raise ValueError(
                f"{source}: {name} is {given!r}, only GPT-2's byte-level BPE ({wanted!r}) is read"
            )
    lines = model.get("merges")
    if not isinstance(lines, list):
        raise ValueError(f"{source}: no model.merges there")
    # 新版的 tokenizers 把一对写成两项的表。
    texts = [" ".join(m) if isinstance(m, list) and all(map(_is_text, m)) else m for m in lines]
    if not all(map(_is_text, texts)):
        raise ValueError(f"{source}: model.merges must be a list of pairs of texts")
    return BPETokenizer("gpt2", vocab, byte_level.parse_merges("\n".join(texts), source), source)


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else part


def _is_text(value: Any) -> bool:
    return isinstance(value, str)

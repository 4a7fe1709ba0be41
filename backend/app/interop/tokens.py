"""分词器写成 Hugging Face 的文件：tokenizer.json、tokenizer_config.json、vocab.json、merges.txt。

模型词表的每一行都有名字：分词器之外的行叫 <|unused_…|>，否则按词表数行数的工具会数错。
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from app.data import byte_level
from app.data.byte_level import SEPARATOR_TEXT
from app.data.hub_tokenizer import HubTokenizer
from app.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)

PAD_TEXT = "<|pad|>"
_PAD = re.compile(r"<\|pad(_\d+)?\|>")
# 别家给填充符起的名字；有就用它的，不另加一行。
_PAD_NAMES = ("<pad>", "[PAD]", "<|padding|>")
# 任何一个字符，含换行；tokenizers 的正则引擎不认 (?s:.)。
_ANY = r"[\s\S]"


@dataclass(frozen=True)
class SpecialIds:
    """end 结束一篇文档，也用作开头，没有则 None；pad 从不被掩码之外的东西认出。"""

    end: int | None
    pad: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """填充的 id 是词表之后的第一个：模型的词表更大就借它一行空的，否则补一行。"""
    pad = tokenizer.vocab_size
    if isinstance(tokenizer, HubTokenizer):
        found = (i for t, i in tokenizer.special_tokens.items() if t in _PAD_NAMES or is_pad(t))
        pad = next((i for i in found if i not in tokenizer.stop_ids), pad)
    return SpecialIds(tokenizer.document_separator, pad)


def is_pad(text: str) -> bool:
    return _PAD.fullmatch(text) is not None


def filler_text(number: int) -> str:
    return f"<|unused_{number}|>"


def is_filler(token: dict[str, Any]) -> bool:
    """id 是数，在旧文件里也可能是写成文字的数。"""
    return str(token["content"]) == f"<|unused_{token['id']}|>"


def hub_tokenizer(tokenizer: Tokenizer, rows: int = 0) -> dict[str, Any]:
    """tokenizer.json 的内容：id 与 tokenizer 的逐一相同，另有填充符与空行的名字。

    rows: 模型的词表有几行。
    """
    pad = special_ids(tokenizer).pad
    empty = unused_ids(tokenizer, max(rows, pad + 1))
    names = {i: pad_text(tokenizer) if i == pad else filler_text(i) for i in empty}
    return _with_names(base_table(tokenizer), names)


def unused_ids(tokenizer: Tokenizer, rows: int) -> list[int]:
    """rows 行里分词器没有词元的，含填充符借用的那行。"""
    size = tokenizer.vocab_size
    used = set(tokenizer.names) if isinstance(tokenizer, HubTokenizer) else set(range(size))
    return sorted(set(range(rows)) - used)


def _with_names(data: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """词表中间的洞填进词表（它按次序给添加的词元编号），其后的是添加的词元。"""
    model, first = data["model"], _first_added(data["model"])
    holes = {text: i for i, text in names.items() if i < first}
    if holes:
        model = {**model, "vocab": {**model["vocab"], **holes}}
    added = [byte_level.added_token(i, text) for i, text in names.items()]
    merged = sorted([*data["added_tokens"], *added], key=lambda token: token["id"])
    return {**data, "model": model, "added_tokens": merged}


def _first_added(model: dict[str, Any]) -> int:
    vocab = model["vocab"]
    return len(vocab) if isinstance(vocab, list) else max(vocab.values(), default=-1) + 1


def pad_text(tokenizer: Tokenizer) -> str:
    """填充符的文字；训练语料里真有这个词元（极少）则加号数，直到不同。"""
    if isinstance(tokenizer, HubTokenizer):
        pad = special_ids(tokenizer).pad
        if pad in tokenizer.names:
            return tokenizer.names[pad]
        taken = set(tokenizer.names.values())
    else:
        taken = set(base_table(tokenizer)["model"]["vocab"])
    text, number = PAD_TEXT, 1
    while text in taken:
        number += 1
        text = f"<|pad_{number}|>"
    return text


def base_table(tokenizer: Tokenizer) -> dict[str, Any]:
    """没有填充符与空行的 tokenizer.json。"""
    match tokenizer:
        case HubTokenizer():
            return {**tokenizer.to_json(), "truncation": None, "padding": None}
        case BPETokenizer():
            return tokenizer.to_json()
        case ByteTokenizer():
            vocab = {byte_level.to_chars(bytes([b])): b for b in range(256)}
            return byte_level.hub_json(vocab, [], tokenizer.document_separator, _extra(tokenizer))
        case CharTokenizer():
            return _characters(tokenizer)
    raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json")


def _characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    vocab = {c: i for i, c in enumerate(tokenizer.to_json()["characters"])}
    end = tokenizer.document_separator
    if end is not None:
        vocab[SEPARATOR_TEXT] = end
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [byte_level.added_token(i, t) for t, i in tokenizer.special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": _ANY}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        # 表外的字符在这里也是错，不悄悄换成别的；库要求有个名字。
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip


def _extra(tokenizer: Tokenizer) -> list[str]:
    """分隔符之外的特殊词元，按 id 的次序。"""
    return [t for t, i in tokenizer.special_tokens.items() if i != tokenizer.document_separator]


def without_separator(tokenizer: Tokenizer) -> Tokenizer:
    """同样的编码，但没有分隔符那一行；只给分隔符在末尾的。"""
    if isinstance(tokenizer, CharTokenizer):
        return CharTokenizer(tokenizer.to_json()["characters"], separator=False)
    data, end = base_table(tokenizer), tokenizer.document_separator
    vocab = {text: i for text, i in data["model"]["vocab"].items() if i != end}
    added = [token for token in data["added_tokens"] if token["id"] != end]
    table = {**data, "added_tokens": added, "model": {**data["model"], "vocab": vocab}}
    return HubTokenizer(json.dumps(table, ensure_ascii=False), None)


def tokenizer_files(tokenizer: Tokenizer, context_size: int, rows: int = 0) -> dict[str, str]:
    """{文件名: 内容}。字节级 BPE 另有 vocab.json 与 merges.txt，给只认得它们的工具。"""
    table = hub_tokenizer(tokenizer, rows)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_size,
        **_named(tokenizer),
        "pad_token": pad_text(tokenizer),
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": json.dumps(table, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    model = table["model"]
    if model["type"] == "BPE" and not isinstance(tokenizer, HubTokenizer):
        files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False) + "\n"
        files["merges.txt"] = "\n".join(["#version: 0.2", *model["merges"], ""])
    return files


def _named(tokenizer: Tokenizer) -> dict[str, str]:
    """只点名表里已有的：点了没有的，transformers 会替它加一个 id。"""
    end = tokenizer.document_separator
    if not isinstance(tokenizer, HubTokenizer):
        names = ("bos_token", "eos_token", "unk_token")
        return {} if end is None else dict.fromkeys(names, SEPARATOR_TEXT)
    start = tokenizer.start_ids[-1] if tokenizer.start_ids else end
    named = {"bos_token": start, "eos_token": end}
    return {name: tokenizer.names[i] for name, i in named.items() if i is not None}

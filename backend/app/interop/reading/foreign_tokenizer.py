"""读别处的分词器：全部文件说的算在一起，id 与 AutoTokenizer 的相同，否则点名不读。

只有 GPT-2 的字节级 BPE 与我们自己的字符表由这里直接读；文件里另有别的话（添加的词元、开头补
空格、别的词表种类），就让 transformers 照它的规矩拼好，拼出的 tokenizer.json 原样留用。
聊天模板从不渲染，文件夹里的代码从不运行。
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.data import byte_level
from app.data.byte_level import SEPARATOR_TEXT, parse_json, read_limited
from app.data.hub_tokenizer import HubTokenizer
from app.data.tokenizers import BPETokenizer, CharTokenizer, Tokenizer
from app.interop.tokens import base_table, is_filler, is_pad

_CONFIG = "tokenizer_config.json"
# 与 id 无关的设置：长度上限、显示、模板、来历。
_HARMLESS = frozenset(
    {
        "model_max_length", "max_len", "clean_up_tokenization_spaces", "errors", "chat_template",
        "name_or_path", "special_tokens_map_file", "tokenizer_file", "backend", "is_local",
        "local_files_only", "padding_side", "truncation_side", "auto_map", "processor_class",
    }
)  # fmt: skip
_CLASSES = ("GPT2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_STOPS = "eos_token_id"


def foreign_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """
    Args:
        rows: 模型的词表有几行；停止 id 不在其中的永远不会生成，不算。

    Raises:
        ValueError: 没有分词器文件，坏了，或不装 transformers 就拼不出来；点名缘由。
    """
    stops = stop_ids(folder, rows)
    reason = next(_beyond_plain(folder, stops), None)
    if reason is None:
        try:
            return read_hub_tokenizer(folder)
        except ValueError as error:
            reason = str(error)
    return _assembled(folder, rows, stops, reason)


def stop_ids(folder: Path, rows: int) -> list[int]:
    """generation_config.json 里的结束 id，没有则 config.json 的；从小到大。

    Raises:
        ValueError: 不是 id 或它们的表。
    """
    for name in ("generation_config.json", "config.json"):
        given = _settings(folder / name).get(_STOPS)
        if given is None:
            continue
        found = given if isinstance(given, list) else [given]
        if any(type(number) is not int or number < 0 for number in found):
            raise ValueError(f"{folder / name}: {_STOPS}={given!r} must be an id or a list of ids")
        return sorted({number for number in found if number < rows})
    return []


def _assembled(folder: Path, rows: int, stops: list[int], reason: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            f"{reason}; other tokenizers need transformers: pip install 'gpt2-workbench[hf]'"
        ) from None
    for path in (*folder.glob("*.json"), *folder.glob("*.model"), *folder.glob("*.txt")):
        read_limited(path)
    try:
        theirs = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        table, end = theirs.backend_tokenizer.to_str(), theirs.eos_token_id
        known = set(theirs.get_vocab().values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # 它抛的种类很多，tokenizers 的内核崩溃（PanicException）还不是 Exception。
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(
            f"{reason}; and transformers cannot read it ({type(error).__name__}: {first})"
        ) from None
    text = json.dumps(_without_ours(json.loads(table), rows), ensure_ascii=False)
    # 没有名字的行从不生成，停在那里没有意义。
    ends = {number for number in stops if number in known} | ({end} - {None})
    return HubTokenizer(text, end, sorted(ends), str(folder))


def _without_ours(data: dict[str, Any], rows: int) -> dict[str, Any]:
    """去掉导出时为空行起的名字：它们不属于分词器，再导出时会重新起。"""
    kept = [
        token
        for token in data["added_tokens"]
        if not is_filler(token) and not (is_pad(token["content"]) and token["id"] >= rows)
    ]
    return {**data, "added_tokens": kept, "truncation": None, "padding": None}


def _beyond_plain(folder: Path, stops: list[int]) -> Iterator[str]:
    """除了词表，还有哪些文件说了会改变 id 或停止处的话。"""
    settings = _settings(folder / _CONFIG)
    where = folder / _CONFIG
    for key, value in settings.items():
        if key in _HARMLESS or not value or value == "None":
            continue
        if key == "tokenizer_class":
            if not isinstance(value, str) or value.removesuffix("Fast") not in _CLASSES:
                yield f"{where}: {key} is {value!r}"
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            for number, token in value.items():
                content = token.get("content") if isinstance(token, dict) else token
                if not _known(content, number):
                    yield f"{where}: {key} has {content!r}, id {number}"
        elif not (key.endswith("_token") and _known(_content(value))):
            yield f"{where}: {key} is {_short(value)}"
    for key, value in _settings(folder / "special_tokens_map.json").items():
        if not _known(_content(value)):
            yield f"{folder / 'special_tokens_map.json'}: {key} is {_short(value)}"
    for text, number in _settings(folder / "added_tokens.json").items():
        if not _known(text, number):
            yield f"{folder / 'added_tokens.json'}: {text!r} has id {number!r}"
    end = settings.get("eos_token")
    if end is not None and _content(end) != SEPARATOR_TEXT:
        yield f"{where}: eos_token is {_short(end)}"
    if len(stops) > 1:
        yield f"{folder}: {_STOPS} is {stops}"


def _known(content: Any, number: Any = None) -> bool:
    """文档分隔符，与导出时加的填充符、空行的名字。"""
    if not isinstance(content, str):
        return False
    return content == SEPARATOR_TEXT or is_pad(content) or is_filler(
        {"content": content, "id": number}
    )  # fmt: skip


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = parse_json(read_limited(path), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(data).__name__}")
    return data


def read_hub_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2 的字节级 BPE（tokenizer.json 或两个词表文件），或本模块写出的字符表。

    Raises:
        ValueError: 没有分词器文件，坏了，或是这里没有的一种（点名是哪一种）。
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        pairs = byte_level.VOCAB_FILE_NAMES
        if any(all((folder / name).is_file() for name in pair) for pair in pairs):
            return BPETokenizer("gpt2", *byte_level.read_vocab_files(folder))
        raise ValueError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json")
    data = parse_json(read_limited(path), str(path))
    model = data.get("model") if isinstance(data, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict):
        raise ValueError(f"{path}: no model.vocab there")
    if model.get("type") == "WordLevel":
        return _read_characters(data, vocab, str(path))
    return _read_bpe(data, model, vocab, str(path))


def _read_characters(data: dict[str, Any], vocab: dict[str, Any], source: str) -> Tokenizer:
    characters = sorted((c for c in vocab if c != SEPARATOR_TEXT), key=lambda c: str(vocab[c]))
    if not characters or any(len(c) != 1 for c in characters):
        raise ValueError(f"{source}: a WordLevel vocabulary of words, only characters can be read")
    if not all(isinstance(number, int) for number in vocab.values()):
        raise ValueError(f"{source}: an id of model.vocab is no number")
    by_id = {number: text for text, number in vocab.items()}
    ordered = [by_id[i] for i in range(len(vocab)) if by_id.get(i, SEPARATOR_TEXT) in characters]
    if len(ordered) != len(characters):
        raise ValueError(f"{source}: the ids are not 0 to {len(vocab) - 1}, once each")
    tokenizer = CharTokenizer(ordered, separator=SEPARATOR_TEXT in vocab)
    expected = base_table(tokenizer)
    free = ("added_tokens", "truncation", "padding")
    for key in sorted({*expected, *data} - set(free)):
        if data.get(key) != expected.get(key):
            raise ValueError(
                f"{source}: {key} is not that of one id a character, in the order of the ids"
            )
    _check_added(data, source)
    return tokenizer


def _read_bpe(
    data: dict[str, Any], model: dict[str, Any], vocab: dict[str, Any], source: str
) -> Tokenizer:
    before = data.get("pre_tokenizer")
    prefix = before.get("add_prefix_space") if isinstance(before, dict) else None
    whole = before.get("use_regex", True) if isinstance(before, dict) else None
    after = _kind(data.get("post_processor"))
    plain = {
        "model.type": (model.get("type"), "BPE"),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or None, None),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or None, None),
        "model.dropout": (model.get("dropout") or None, None),
        "model.ignore_merges": (bool(model.get("ignore_merges")), False),
        "model.byte_fallback": (bool(model.get("byte_fallback")), False),
        "normalizer": (data.get("normalizer"), None),
        "pre_tokenizer": (_kind(before), "ByteLevel"),
        "pre_tokenizer.add_prefix_space": (bool(prefix), False),
        "pre_tokenizer.use_regex": (whole, True),
        # ByteLevel 在这里只改偏移，不改 id。
        "post_processor": (after if after != "ByteLevel" else None, None),
    }
    for name, (given, wanted) in plain.items():
        if given != wanted:
            raise ValueError(
                f"{source}: {name} is {_short(given)}, only GPT-2's byte-level BPE ({wanted!r}) is "
                "read"
            )
    _check_added(data, source)
    lines = model.get("merges")
    if not isinstance(lines, list):
        raise ValueError(f"{source}: no model.merges there")
    # 新版的 tokenizers 把一对写成两项的表。
    texts = [" ".join(m) if isinstance(m, list) and all(map(_is_text, m)) else m for m in lines]
    if not all(map(_is_text, texts)):
        raise ValueError(f"{source}: model.merges must be a list of pairs of texts")
    return BPETokenizer("gpt2", vocab, byte_level.parse_merges("\n".join(texts), source), source)


def _check_added(data: dict[str, Any], source: str) -> None:
    added = data.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        number = token.get("id") if isinstance(token, dict) else None
        if not _known(_content(token), number):
            raise ValueError(f"{source}: the token {_content(token)!r} was added as id {number!r}")


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else part


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

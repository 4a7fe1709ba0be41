"""字节级 BPE 的词表：读取、核对、在语料上训练、写成通用的 tokenizer.json 形状。

GPT-2 把 256 个字节各映射到一个可见字符，词表和合并表都用这些字符书写（openai/gpt-2
encoder.py 的 bytes_to_unicode）。编码本身交给 tiktoken：它以 id 为合并次序，所以这里
核对“合并次序与 id 同向”，不一致的词表宁可拒绝。
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SEPARATOR_TEXT = "<|endoftext|>"

# openai/gpt-2 encoder.py 的切分规则；占有量词（++）只为不回溯，切分结果相同。
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# GPT-2 的词表文件有两套通行的名字，外加把两个文件放进同一个资料夹时常用的名字。
VOCAB_FILE_NAMES = (
    ("vocab.bpe", "encoder.json"),
    ("merges.txt", "vocab.json"),
    ("gpt2_vocab.bpe", "gpt2_encoder.json"),
)
_MAX_FILE_BYTES = 256 * 2**20

# tiktoken 的正则在约一百万个连续空白处栈溢出并中止进程，所以更长的空白段先切开。
MAX_SPACE_RUN = 65_536
_LONG_SPACES = re.compile(rf"(?<!\s)\s{{{MAX_SPACE_RUN + 1},}}")
# 训练时一个“词”的代价是长度的平方（几十万个相同字符要一分钟以上），所以先切短。
MAX_TRAINING_RUN = 1024
_LONG_RUNS = re.compile(
    rf"(?<!\s)\s{{{MAX_TRAINING_RUN + 1},}}|(?<!\S)\S{{{MAX_TRAINING_RUN + 1},}}"
)


@cache
def byte_to_char() -> tuple[str, ...]:
    """第 b 项是字节 b 的可见字符。"""
    table = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + sum(1 for c in table.values() if ord(c) >= 256))
    return tuple(table[b] for b in range(256))


@cache
def _char_to_byte() -> dict[str, int]:
    return {char: b for b, char in enumerate(byte_to_char())}


def to_chars(token: bytes) -> str:
    return "".join(byte_to_char()[b] for b in token)


def to_bytes(chars: str, source: str) -> bytes:
    table = _char_to_byte()
    for char in chars:
        if char not in table:
            raise ValueError(
                f"{source}: token {chars!r} has the character {char!r}, which is not one of the "
                "256 of a byte-level vocabulary"
            )
    return bytes(table[char] for char in chars)


def parse_merges(text: str, source: str) -> list[tuple[str, str]]:
    """合并表：每行两段；第一行可以是 `#version`。"""
    lines = text.split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{source}: merge {number} is {line!r}, expected two tokens")
        merges.append((parts[0], parts[1]))
    return merges


def check_vocabulary(
    vocab: dict[str, Any], merges: list[tuple[str, str]], source: str
) -> tuple[dict[bytes, int], int]:
    """返回 ({字节串: id}, 文档分隔符的 id)。

    Raises:
        ValueError: 缺字节、id 不是 0..n-1 各一次、合并缺失或与 id 的次序相反。
    """
    ids: dict[int, str] = {}
    for token, number in vocab.items():
        # 各不相同且都小于个数，就恰好是 0..n-1 各一次
        if type(number) is not int or not 0 <= number < len(vocab):
            raise ValueError(
                f"{source}: token {token!r} has id {number!r}, "
                f"outside a vocabulary of {len(vocab)} tokens"
            )
        if number in ids:
            raise ValueError(f"{source}: id {number} stands for both {ids[number]!r} and {token!r}")
        ids[number] = token
    separator = vocab.get(SEPARATOR_TEXT, len(vocab))
    ranks = {to_bytes(t, source): i for t, i in vocab.items() if t != SEPARATOR_TEXT}
    _check_merges(ranks, merges, source)
    return ranks, separator


def _check_merges(ranks: dict[bytes, int], merges: list[tuple[str, str]], source: str) -> None:
    for b in range(256):
        if bytes([b]) not in ranks:
            raise ValueError(f"{source}: the byte 0x{b:02X} has no token; all 256 are needed")
    made: dict[bytes, int] = {}
    last = -1
    for left, right in merges:
        parts = to_bytes(left, source), to_bytes(right, source)
        whole = parts[0] + parts[1]
        for token in (*parts, whole):
            if token not in ranks:
                raise ValueError(
                    f"{source}: the merge {left!r} + {right!r} needs the token "
                    f"{to_chars(token)!r}, which is not in the vocabulary"
                )
        if whole in made:
            continue
        if ranks[whole] < last:
            raise ValueError(
                f"{source}: the merge {left!r} + {right!r} has id {ranks[whole]} after id {last}; "
                "the ids must follow the order of the merges"
            )
        last = made[whole] = ranks[whole]
    for token in ranks:
        if len(token) > 1 and token not in made:
            raise ValueError(
                f"{source}: no merge makes the token {to_chars(token)!r}; "
                "is the merges file complete, and does it belong to this vocabulary?"
            )


def read_limited(path: Path) -> bytes:
    """读一个小文件；大得荒唐的在读入之前拒绝。"""
    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"{path}: {size} bytes is too large for a tokenizer file")
    return path.read_bytes()


def parse_json(data: bytes, source: str) -> Any:
    """JSON，重复的键算错（标准库会默默取最后一个）。"""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"{source}: {twice!r} appears twice")
        return result

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at {error.start})") from None
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON ({error}); is the file complete?") from None
    except RecursionError:
        raise ValueError(f"{source}: JSON nested too deep") from None


def read_vocab_files(folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]], str]:
    """从一个文件夹读 GPT-2 的两个词表文件。

    Raises:
        ValueError: 没有任何一对文件，或内容不成形。
    """
    for merges_name, vocab_name in VOCAB_FILE_NAMES:
        merges_path, vocab_path = folder / merges_name, folder / vocab_name
        if merges_path.is_file() and vocab_path.is_file():
            return parse_vocab_files(
                read_limited(merges_path), read_limited(vocab_path), str(merges_path)
            )
    names = "; ".join(" + ".join(pair) for pair in VOCAB_FILE_NAMES)
    raise ValueError(f"{folder}: no GPT-2 vocabulary files there, looked for {names}")


def parse_vocab_files(
    merges: bytes, vocab: bytes, source: str
) -> tuple[dict[str, Any], list[tuple[str, str]], str]:
    table = parse_json(vocab, source)
    if not isinstance(table, dict):
        raise ValueError(f"{source}: the vocabulary is a {type(table).__name__}, expected {{}}")
    try:
        text = merges.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at {error.start})") from None
    return table, parse_merges(text, source), source


def train(texts: Iterable[str], n_tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """在 texts 上训练字节级 BPE：256 个字节在前，合并按次序在后，至多 n_tokens 个。"""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=sorted(byte_to_char()),
        special_tokens=[],
        show_progress=False,
    )
    short = (part for text in texts for part in _split_runs(text, _LONG_RUNS, MAX_TRAINING_RUN))
    model.train_from_iterator(short, trainer)
    state = json.loads(model.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return state["vocab"], merges


def added_token(number: int, text: str) -> dict[str, Any]:
    """tokenizer.json 的 added_tokens 里的一项。"""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **plain, "special": True}


def hub_json(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    separator: int,
    special: Sequence[str] = (),
) -> dict[str, Any]:
    """Hugging Face `tokenizers` 能直接打开的形状；special 接在词表之后。"""
    table = dict(sorted({**vocab, SEPARATOR_TEXT: separator}.items(), key=lambda x: x[1]))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(separator, SEPARATOR_TEXT),
            *(added_token(len(table) + i, text) for i, text in enumerate(special)),
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": table,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def split_long_spaces(text: str) -> Iterator[str]:
    """把超长的空白段切成正则受得住的几段；绝大多数文本原样给回。"""
    return _split_runs(text, _LONG_SPACES, MAX_SPACE_RUN)


def _split_runs(text: str, runs: re.Pattern[str], size: int) -> Iterator[str]:
    start = 0
    for run in runs.finditer(text):
        for cut in range(run.start() + size, run.end(), size):
            yield text[start:cut]
            start = cut
    yield text[start:]

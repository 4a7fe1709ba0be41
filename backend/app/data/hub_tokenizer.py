"""外来的分词器：一份 Hugging Face `tokenizers` 的 tokenizer.json，原样保存、原样使用。

字节级 BPE 之外的一切（规范化、加空格、添加的词元、WordPiece、Unigram……）都由那个库算，
所以 id 与它的完全相同。特殊词元只有程序能写出：文本里写着的 `</s>` 仍是文本。
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.data import byte_level
from app.data.token_table import TableTokenizer, utf8

MAX_VOCAB = 10_000_000
# 解码时垫在前面的普通文字：词元在文本中间的写法，减去它。
_ANCHOR = "a"
# 编码时垫在前面的：与文本并成一个词元的（as、and）不能用，就换下一个。
_ANCHORS = (_ANCHOR, "A", "0", ".")
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HubTokenizer(TableTokenizer):
    """text 是 tokenizer.json 的内容；separator 是文档结束符（通常是 eos），可以没有。

    names {id: 文字} 是它的全部词元，id 之间可以有洞。
    stop_ids 是生成时的停止 id，默认只有 separator。decode 是各词元在文本中间的字节相接，
    与流式解码相同：会给文本补空格的分词器，解出的文本开头就有那个空格。

    Raises:
        ValueError: 那个库读不了、编码是随机的（dropout）、separator 或 stop_ids 不是它的 id。
    """

    kind = "hub"

    def __init__(
        self,
        text: str,
        separator: int | None,
        stop_ids: Sequence[int] | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        from tokenizers import Tokenizer

        data = byte_level.parse_json(utf8(text), source)
        model = data.get("model") if isinstance(data, dict) else None
        if isinstance(model, dict) and model.get("dropout"):
            raise ValueError(
                f"{source}: model.dropout={model['dropout']} makes the encoding random: set it to "
                "null to get the same ids each time"
            )
        try:
            self._hub = Tokenizer.from_str(text)
        except Exception as error:  # 那个库只抛 Exception 本身
            raise ValueError(
                f"{source}: the tokenizers package cannot read it ({error}): is the file complete, "
                "and of a version that this package knows?"
            ) from None
        # 截断与补齐是那边批处理的事；AutoTokenizer 默认也不做
        self._hub.no_truncation()
        self._hub.no_padding()
        self._hub.encode_special_tokens = True
        self._text, self._data = text, data
        self.names = names = {i: t for t, i in self._hub.get_vocab(with_added_tokens=True).items()}
        size = max(names, default=-1) + 1
        if not 1 <= size <= MAX_VOCAB:
            raise ValueError(f"{source}: {size} ids, must be between 1 and {MAX_VOCAB}")
        added = self._hub.get_added_tokens_decoder()
        self._unknown = self._unknown_id()
        # 字节退路的 <0x0A> 由文本写出，有的文件却也记作特殊
        fallback = bool(data["model"].get("byte_fallback"))
        self._special = {
            i: t.content
            for i, t in added.items()
            if t.special and not (fallback and _FALLBACK_BYTE.fullmatch(t.content))
        }
        for name, number in [("separator", separator), *(("stop id", i) for i in stop_ids or ())]:
            if number is not None and number not in names:
                raise ValueError(f"{source}: the {name} {number} is not one of its {size} ids")
        if separator is not None:
            self._special.setdefault(separator, names[separator])
        # 未知词元是表外的文本，编码会写出它
        self._forbidden = np.array(sorted(self._special.keys() - {self._unknown}), dtype=np.uint32)
        self._anchor = self._raw(_ANCHOR)
        table = [b""] * size
        for number, name in names.items():
            whole = number in self._special or (number in added and not added[number].special)
            table[number] = name.encode() if whole else self._bytes_of(number, name)
        super().__init__(table, separator)
        given = stop_ids if stop_ids is not None else [] if separator is None else [separator]
        self._stop_ids = tuple(given)
        self._start_ids = self._start()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def start_ids(self) -> tuple[int, ...]:
        return self._start_ids

    @property
    def special_tokens(self) -> dict[str, int]:
        """{文字: id}：文本里见到这些文字，也只当普通文本。"""
        return {text: number for number, text in self._special.items()}

    def _extended(self, special: Sequence[str]) -> HubTokenizer:
        first = self.vocab_size
        added = [byte_level.added_token(first + i, text) for i, text in enumerate(special)]
        data = {**self._data, "added_tokens": [*(self._data.get("added_tokens") or []), *added]}
        text = json.dumps(data, ensure_ascii=False)
        made = HubTokenizer(text, self._separator, self._stop_ids)
        wrong = [t for i, t in enumerate(special) if made.special_tokens.get(t) != first + i]
        if wrong:
            raise ValueError(
                f"special token {wrong[0]!r} cannot follow the tokenizer's {first} ids: it is an "
                "ordinary token already, or the ids have holes"
            )
        return made

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        encodings = self._hub.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(e.ids, dtype=np.uint32) for e in encodings]
        return [
            np.array(self._cut(t), dtype=np.uint32) if self._is_special(a) else a
            for t, a in zip(texts, arrays, strict=True)
        ]

    def encode_continued(self, texts: Sequence[str]) -> list[np.ndarray]:
        """垫一个字在前面再编码，减去它：开头补空格、`▁` 之类的规则都不会触发。"""
        return [np.array(self._continued(text), dtype=np.uint32) for text in texts]

    def _continued(self, text: str) -> list[int]:
        utf8(text)
        rest = self._after(text)
        if rest is None:
            return self.encode(text)
        return self._cut(text, first=False) if self._is_special(rest) else rest

    def _after(self, text: str) -> list[int] | None:
        """text 接在别的文字之后的 id；None = 与哪个字都并在一起，或那些字它都不认得。"""
        for anchor in _ANCHORS:
            before, ids = self._raw(anchor), self._raw(anchor + text)
            known = before and self._unknown not in before
            if known and ids[: len(before)] == before:
                return ids[len(before) :]
        return None

    def to_json(self) -> dict[str, Any]:
        return self._data

    def _serialised(self) -> bytes:
        return utf8(self._text)

    def _extra_meta(self) -> dict[str, Any]:
        return {"stop_ids": list(self._stop_ids)}

    def fingerprint(self) -> str:
        """分隔符不在 tokenizer.json 里，却写进数据，所以也算在内。"""
        extra = json.dumps([self._separator, self._stop_ids]).encode("ascii")
        return hashlib.sha256(self._serialised() + extra).hexdigest()

    def _raw(self, text: str) -> list[int]:
        return self._hub.encode(text, add_special_tokens=False).ids

    def _is_special(self, ids: Sequence[int] | np.ndarray) -> bool:
        return bool(np.isin(np.asarray(ids, dtype=np.uint32), self._forbidden).any())

    def _cut(self, text: str, first: bool = True) -> list[int]:
        """词表里直接有 `</s>` 的（Unigram、WordLevel）：从记号中间切开，各编各的。"""
        marks = "|".join(re.escape(t) for t in self._special.values() if len(t) > 1)
        borders = [m.start() + 1 for m in re.finditer(marks, text)] if marks else []
        ids: list[int] = []
        for start, end in zip([0, *borders], [*borders, len(text)], strict=True):
            fresh = first and not start
            part = self._raw(text[start:end]) if fresh else self._after(text[start:end])
            if part is None:
                raise ValueError(
                    f"the text {text[start:end][:60]!r} cannot be cut out of {text[:60]!r} by this "
                    "tokenizer, which merges it with every letter before it: take it out"
                )
            ids += part
        if self._is_special(ids):
            bad = next(self._special[i] for i in ids if i in self._special and i != self._unknown)
            raise ValueError(
                f"the text {text[:60]!r} holds {bad!r} written out, and this tokenizer has no "
                "other way to write it: take it out of the text"
            )
        return ids

    def _unknown_id(self) -> int | None:
        model = self._data["model"]
        if isinstance(model.get("unk_id"), int):
            return model["unk_id"]
        name = model.get("unk_token")
        return self._hub.token_to_id(name) if isinstance(name, str) else None

    def _bytes_of(self, number: int, name: str) -> bytes:
        decoder = json.dumps(self._data.get("decoder"))
        if '"ByteLevel"' in decoder:
            try:
                return byte_level.to_bytes(name, "tokenizer.json")
            except ValueError:  # 不是字节级写法的词元就是它自己
                return name.encode()
        if '"ByteFallback"' in decoder and (match := _FALLBACK_BYTE.fullmatch(name)):
            return bytes([int(match[1], 16)])
        before = self._hub.decode(self._anchor, skip_special_tokens=False)
        whole = self._hub.decode([*self._anchor, number], skip_special_tokens=False)
        return (whole[len(before) :] if whole.startswith(before) else name).encode()

    def _start(self) -> tuple[int, ...]:
        """post_processor 加在文本之前的 id；加在之后的（eos）不属于还要续写的文本。"""
        whole = self._hub.encode(_ANCHOR, add_special_tokens=True).ids
        size = len(self._anchor)
        for start in range(len(whole) - size + 1):
            if whole[start : start + size] == self._anchor:
                return tuple(whole[:start])
        return ()

"""开工之前说清楚：读什么、不读什么、什么只当纯文本；没有用处的选项拒绝。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from app.data.reading.inventory import counts
from app.data.reading.sources import Reading, Sources
from app.data.split import Plan
from app.data.tokenizers import CharTokenizer

Say = Callable[[str], None]
_SHOWN = 5


def take_stock(sources: Sources, val: Sources | None, say: Say) -> None:
    """
    Raises:
        ValueError: 给了选项，却没有它管得着的文件。
    """
    plain, records, paths = Counter[str](), Counter[str](), list(sources.paths)
    for what, given in (("reading", sources), ("validation text:", val)):
        if given is None:
            continue
        say(f"{what} {given.description}")
        seen = given.inventory()
        for line in seen.lines(given.reading.splits):
            say(f"  {line}")
        plain += seen.plain
        records += seen.records
    if val is not None:
        paths += val.paths
    if sources.reading.suffixes and not any(path.is_dir() for path in paths):
        raise ValueError(
            f"--suffixes {' '.join(sources.reading.suffixes)} needs a folder to choose from, but "
            f"{paths[0]} is a file: leave it out"
        )
    _check_use(sources.reading, plain, records)


def _check_use(reading: Reading, plain: Counter[str], records: Counter[str]) -> None:
    if reading.text_key is not None and not records:
        raise ValueError(
            f"--text-key {reading.text_key} has nothing to read: the sources hold plain text only "
            f"({counts(plain)}): leave it out, or give jsonl, json, csv, tsv or parquet files"
        )
    if reading.splits and not plain:
        flag = "--document-per-line" if reading.document_per_line else "--document-separator"
        raise ValueError(
            f"{flag} splits plain text, but the sources hold records only ({counts(records)}): "
            "leave it out"
        )


def tell(plan: Plan, reading: Reading, say: Say) -> None:
    """读过一遍之后才知道的事。"""
    strange = sorted(n for n, error in plan.skipped.items() if not error.binary)
    binary = Counter(Path(n).suffix.lower() for n, error in plan.skipped.items() if error.binary)
    for name in strange[:_SHOWN]:
        say(f"skipped {plan.skipped[name]}")
    if len(strange) > _SHOWN:
        say(f"skipped {len(strange)} files that are not UTF-8 text")
    if binary:
        say(f"not text, left out: {counts(binary)}")
    if plan.empty:
        say(f"left out {plan.empty} empty documents")
    for marker, times in plan.markers.most_common(_SHOWN):
        fix = "" if reading.splits else f"; --document-separator {marker!r} splits plain text there"
        say(f"{marker!r} stands {times:,} times in the text and is taken as plain text{fix}")
    if plan.raw:
        say(
            f"{len(plan.raw):,} documents of plain text begin with a JSON object ({plan.raw[0]} is "
            "the first): name the file .jsonl to read one document a line"
        )
    if plan.shared:
        say(
            f"warning: {len(plan.shared):,} documents are in both the training and the validation "
            f"text ({plan.shared[0]} is the first): the validation loss will be too low"
        )
    if plan.split == "tail":
        say(
            f"the documents are too few or too uneven to hold out {plan.val_fraction:.0%} of them: "
            f"the last {plan.val_fraction:.0%} of the text is the validation set"
        )


def check_separator(sources: Sources, val: Sources | None) -> None:
    """读过之后才知道。

    Raises:
        ValueError: 分隔文字哪里也没有。
    """
    separator = sources.reading.document_separator
    found = sources.separators + (val.separators if val else Counter())
    if separator is not None and not found:
        raise ValueError(
            f"--document-separator {separator!r} is nowhere in {sources.description}: check how it "
            "is written there, or leave it out"
        )


def check_characters(tokenizer: CharTokenizer, sources: Sources, plan: Plan) -> None:
    """现成的字符表认得全部文本。

    Raises:
        ValueError: 有表外的字符；点名几个，和第一个的位置。
    """
    missing = plan.alphabet - set(tokenizer.characters)
    if not missing:
        return
    shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in sorted(missing)[:_SHOWN])
    raise ValueError(
        f"{_place(sources, plan, missing)}: {len(missing)} characters of the text are not among "
        f"the tokenizer's {len(tokenizer.characters)}: {shown}: replace them, or use another "
        "tokenizer"
    )


def _place(sources: Sources, plan: Plan, wanted: frozenset[str]) -> str:
    for given in (plan.held, sources):
        for document in given.documents() if given else ():
            if document.name in plan.skipped:
                continue
            line = 1
            for piece in document.pieces():
                for number, char in enumerate(piece):
                    if char in wanted:
                        line += piece.count("\n", 0, number)
                        return f"{document.name} line {line}"
                line += piece.count("\n")
    return sources.description

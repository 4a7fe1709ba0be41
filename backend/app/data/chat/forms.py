"""一条记录是哪种写法：由它的键认出；认不出就点名这些键和最近的写法。"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.data.reading.inventory import counts
from app.data.reading.sources import NothingToReadError, Reading, Sources
from app.data.shards import Kind

Format = Literal["auto", "text", "chat", "pairs", "preference"]


@dataclass(frozen=True)
class Form:
    """keys 必须有，also 可以有。"""

    kind: Kind
    keys: tuple[str, ...]
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join(self.keys)


# 先具体的，后宽泛的；text 在前：从前凡有 text 的记录都当作文本，这不变。
FORMS = (
    Form("text", ("text",)),
    Form("chat", ("messages",)),
    Form("chat", ("conversations",)),
    Form("preference", ("prompt", "chosen", "rejected")),
    Form("pairs", ("prompt", "completion")),
    Form("pairs", ("instruction", "output"), also=("input",)),
)
# 常见的别名，只用来建议 --columns，从不自行改名
_ALIASES = {
    "text": ("body", "content", "article", "document", "story", "poem", "sentence"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "message"),
    "prompt": ("question", "query", "input", "user", "instruction", "context", "q"),
    "completion": ("answer", "response", "output", "reply", "target", "assistant", "a"),
    "chosen": ("accepted", "preferred", "better", "winner", "positive"),
    "rejected": ("refused", "dispreferred", "worse", "loser", "negative"),
}


def detect(
    paths: Sequence[str], suffixes: tuple[str, ...], wanted: Format, columns: Mapping[str, str]
) -> Form | None:
    """来源里的记录是哪种写法；没有记录文件是 None。

    Raises:
        ValueError: 认不出，或文件夹里既有对话又有纯文本，不知道要哪一种。
    """
    as_records = Sources(paths, Reading(suffixes=suffixes, form="records"))
    sources = as_records
    if wanted == "auto" and not columns:
        # 与文本同样的规矩：文件夹里的 json 与 csv 可能只是设置，别无可读的时候才看它们
        as_text = Sources(paths, Reading(suffixes=suffixes))
        try:
            plain = as_text.inventory().plain
            sources = as_text
        except NothingToReadError:
            plain = None
    first = sources.first_record()
    if first is None:
        return None
    where, record = first
    form = form_of(renamed(record, columns, where), wanted, where)
    if wanted == "auto" and form.kind != "text" and sources is not as_records and plain:
        raise ValueError(
            f"{where} is of the form {form}, but there are also {counts(plain)} of plain text: "
            f"choose with --format {form.kind} or --format text"
        )
    return form


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """`new=old` 的各项：{新名: 记录里的名}。

    Raises:
        ValueError: 写法不对、同一个名字两次。
    """
    result: dict[str, str] = {}
    known = sorted({key for form in FORMS for key in (*form.keys, *form.also)})
    for item in (part for text in given for part in text.split(",")):
        new, equals, old = item.partition("=")
        if not equals or not new or not old or new in result:
            raise ValueError(
                f"--columns {item!r} is not new=old with each new name once: write "
                "--columns text=body, say"
            )
        if new not in known:
            raise ValueError(
                f"--columns {item!r}: {new!r} is not a key of any form ({', '.join(known)}): the "
                "new name stands before the equals sign"
            )
        result[new] = old
    return result


def renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: 记录里没有要改名的键。
    """
    if not columns:
        return dict(record)
    for old in columns.values():
        if old not in record:
            raise ValueError(
                f"{where}: no key {old!r} (keys: {_listed(record)}): correct --columns"
            )
    taken = {*columns, *columns.values()}
    rest = {key: value for key, value in record.items() if key not in taken}
    return rest | {new: record[old] for new, old in columns.items()}


def form_of(record: Mapping[str, Any], wanted: Format, where: str) -> Form:
    """
    Raises:
        ValueError: 没有一种写法合这些键（点名最近的），或合的不是要的那一类。
    """
    # 表格里各种写法并存时，空着的列不算
    present = {key for key, value in record.items() if value is not None or key == "text"}
    fitting = [form for form in FORMS if present.issuperset(form.keys)]
    allowed = [form for form in fitting if wanted in ("auto", form.kind)]
    if allowed:
        return allowed[0]
    if fitting:
        raise ValueError(
            f"{where}: --format {wanted}, but the keys are those of {fitting[0].kind} "
            f"({fitting[0]}): use --format {fitting[0].kind} or auto, or rename with --columns"
        )
    raise ValueError(
        f"{where}: the keys {_listed(record)} make no known form; {_nearest(list(record), wanted)}"
    )


def _nearest(keys: Collection[str], wanted: Format) -> str:
    """最近的写法，能改名就给出改名的选项。"""
    forms = [form for form in FORMS if wanted in ("auto", form.kind)]
    best = max(forms, key=lambda form: len(_matched(form, keys)) / len(form.keys))
    found = _matched(best, keys)
    if len(found) == len(best.keys):
        columns = ",".join(f"{new}={old}" for new, old in found.items() if new != old)
        return f"the nearest is {best}: add --columns {columns}"
    nearest = f"; the nearest is {best}" if found else ""
    return f"the forms are {'; '.join(map(str, forms))}{nearest}: rename with --columns NEW=OLD"


def _matched(form: Form, keys: Collection[str]) -> dict[str, str]:
    """{写法的键: 记录里像它的键}，一个键只用一次。"""
    found: dict[str, str] = {}
    for key in form.keys:
        free = [name for name in keys if name not in found.values()]
        lower = {name.lower(): name for name in free}
        close = difflib.get_close_matches(key, lower, n=1, cutoff=0.75)
        names = [n for n in (key, *_ALIASES.get(key, ())) if n in lower] or close
        if names:
            found[key] = lower[names[0]]
    return found


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "none"

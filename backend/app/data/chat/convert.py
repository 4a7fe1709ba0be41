"""一条记录 -> 对话；空的回答、相同的两边之类都是错，点名文件与行。"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from app.common.files import write_atomic
from app.data.chat.encode import Turn
from app.data.chat.forms import Form
from app.data.reading.records import checked

# conversations（ShareGPT）里各家的称呼
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
_FIX = "fix the record or take it out"
EXAMPLES_FILE = "examples.json"
MOST_EXAMPLES = 50

Turns = list[Turn]


@dataclass(frozen=True)
class Example:
    """sides：一段对话，偏好则是选中的与落选的两段。"""

    where: str
    sides: tuple[Turns, ...]


def example_of(record: Mapping[str, Any], form: Form, where: str) -> Example:
    """
    Raises:
        ValueError: 内容不成形、没有回答、回答是空的、偏好的两边相同；点名位置。
    """
    missing = [key for key in form.keys if record.get(key) is None]
    if missing:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(
            f"{where}: no {missing[0]!r} (keys: {keys}), but the first record is of the form "
            f"{form}: prepare different forms apart"
        )
    sides: tuple[Turns, ...]
    if form.kind == "preference":
        sides = _preference(record, where)
    elif form.keys == ("messages",):
        sides = (_messages(record["messages"], f"{where}: 'messages'"),)
    elif form.keys == ("conversations",):
        sides = (_conversations(record["conversations"], f"{where}: 'conversations'"),)
    elif form.keys == ("prompt", "completion"):
        asked = _side(record["prompt"], "user", f"{where}: 'prompt'")
        answer = _side(record["completion"], "assistant", f"{where}: 'completion'")
        sides = ([replace(turn, scored=False) for turn in asked] + answer,)
    else:
        sides = (_instruction(record, where),)
    for side in sides:
        _check_answers(side, where)
    return Example(where, sides)


def save_examples(folder: Path, conversations: Sequence[Turns]) -> None:
    """前 MOST_EXAMPLES 段对话的原文，留在数据旁边：导出模板时拿来核对。"""
    data = json.dumps([[asdict(turn) for turn in turns] for turns in conversations])
    write_atomic(folder / EXAMPLES_FILE, (data + "\n").encode("ascii"))


def first_conversations(folder: Path) -> list[Turns]:
    """
    Raises:
        ValueError: 没有，或坏了。
    """
    inner = folder / "train" if (folder / "train").is_dir() else folder
    try:
        data = json.loads((inner / EXAMPLES_FILE).read_bytes())
        return [[Turn(**turn) for turn in turns] for turns in data]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{inner}: no conversations in {EXAMPLES_FILE} ({error}): give a folder that "
            "`gpt2 prepare` wrote from conversations"
        ) from None


def _instruction(record: Mapping[str, Any], where: str) -> Turns:
    """input 空一行接在 instruction 之后。"""
    asked = checked(record["instruction"], f"{where}: 'instruction'")
    given = checked(record.get("input") or "", f"{where}: 'input'")
    answer = checked(record["output"], f"{where}: 'output'")
    asked = f"{asked}\n\n{given}" if given else asked
    return [Turn("user", asked, scored=False), Turn("assistant", answer)]


def _preference(record: Mapping[str, Any], where: str) -> tuple[Turns, Turns]:
    asked = _side(record["prompt"], "user", f"{where}: 'prompt'")
    asked = [replace(turn, scored=False) for turn in asked]
    plain = [(turn.role, turn.content) for turn in asked]
    sides = []
    for key in ("chosen", "rejected"):
        answer = _side(record[key], "assistant", f"{where}: {key!r}")
        # 有的数据在两边又各写一遍提问
        if [(turn.role, turn.content) for turn in answer[: len(asked)]] == plain:
            answer = answer[len(asked) :]
        sides.append(asked + answer)
    if sides[0] == sides[1]:
        raise ValueError(f"{where}: 'chosen' and 'rejected' are equal: {_FIX}")
    return sides[0], sides[1]


def _side(given: Any, role: str, where: str) -> Turns:
    """一段文字，或几句话。"""
    if isinstance(given, list):
        return _messages(given, where)
    return [_turn(role, checked(given, where))]


def _messages(given: Any, where: str) -> Turns:
    turns = []
    for number, message in enumerate(_listed(given, where), start=1):
        at = f"{where} item {number}"
        _nothing_lost(message, ("role", "content", "weight"), at)
        role = checked(message.get("role"), f"{at}: 'role'")
        text = checked(message.get("content"), f"{at}: 'content'")
        turns.append(_turn(role, text, _weight(message, at)))
    return turns


def _conversations(given: Any, where: str) -> Turns:
    turns = []
    for number, message in enumerate(_listed(given, where), start=1):
        at = f"{where} item {number}"
        _nothing_lost(message, ("from", "value", "weight"), at)
        speaker = checked(message.get("from"), f"{at}: 'from'")
        if speaker not in _SPEAKERS:
            raise ValueError(f"{at}: from={speaker!r} is not one of {', '.join(_SPEAKERS)}: {_FIX}")
        text = checked(message.get("value"), f"{at}: 'value'")
        turns.append(_turn(_SPEAKERS[speaker], text, _weight(message, at)))
    return turns


def _nothing_lost(message: Mapping[str, Any], read: Sequence[str], at: str) -> None:
    # 表格里没有的键读出来是 None
    unknown = [key for key in sorted(set(message) - set(read)) if message[key] is not None]
    if unknown:
        raise ValueError(
            f"{at}: {', '.join(map(repr, unknown))} would be lost ({', '.join(read[:-1])} and "
            f"{read[-1]} are read): {_FIX}"
        )


def _weight(message: Mapping[str, Any], at: str) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"{at}: weight={weight!r} is neither 0 (not scored) nor 1: {_FIX}")
    return weight != 0


def _turn(role: str, content: str, scored: bool = True) -> Turn:
    return Turn(role, content, scored and role == "assistant")


def _listed(given: Any, where: str) -> list[dict[str, Any]]:
    """csv 的一格里也可以是写成 JSON 的列表。"""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} is a text, expected a list of messages: {_FIX}") from None
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise ValueError(f"{where} is {type(given).__name__}, expected a list of messages: {_FIX}")
    return given


def _check_answers(turns: Turns, where: str) -> None:
    answers = [turn for turn in turns if turn.scored]
    if not answers:
        raise ValueError(f"{where}: there is no answer of the assistant to learn from: {_FIX}")
    if not all(turn.content.strip() for turn in answers):
        raise ValueError(f"{where}: an answer of the assistant is empty: {_FIX}")

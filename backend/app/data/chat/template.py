"""对话模板：每种话前后写什么、计不计分、以什么收尾；存成 chat.json，与分词器同行。

特殊词元单列为 Special，其余都是普通文字：用户的话里写着的 `<|im_end|>` 永远成不了特殊词元。
一句话的文字紧靠别的文字时（alpaca、plain），换行归前一段固定的文字，使分开编码与整段编码在
GPT-2 的切分规则下相同。
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.common.files import write_atomic
from app.data.byte_level import parse_json, read_limited
from app.data.tokenizers import Tokenizer, load_tokenizer

CHAT_FILE = "chat.json"
NAMES = ("chatml", "alpaca", "plain")
SCHEMA_VERSION = 1
_PREPARE = "prepare the conversations again"


@dataclass(frozen=True)
class Special:
    """一个特殊词元，以它的文字指明。"""

    text: str


Part = str | Special


@dataclass(frozen=True)
class Role:
    before: tuple[Part, ...]
    after: tuple[Part, ...]
    scored: bool = False


@dataclass(frozen=True)
class Template:
    """start：每段对话开头的特殊词元；stop：写到其中一个就算答完。

    Raises:
        ValueError: 没有计分的角色，或它的收尾里没有 stop：那样的模型永远不会停。
    """

    name: str
    start: tuple[str, ...]
    roles: dict[str, Role]
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        answering = {name: role for name, role in self.roles.items() if role.scored}
        if not answering:
            raise ValueError(f"template {self.name}: no role is scored: mark the assistant's")
        for name, role in answering.items():
            if not any(isinstance(p, Special) and p.text in self.stop for p in role.after):
                raise ValueError(
                    f"template {self.name}: nothing after a turn of {name!r} is one of the stop "
                    f"tokens {list(self.stop)}, so the end of a turn would not be scored and the "
                    "model would never stop: end the turn with one"
                )

    @property
    def answerer(self) -> str:
        """由模型来说的角色。"""
        return next(name for name, role in self.roles.items() if role.scored)

    def specials(self) -> Iterator[str]:
        """用到的特殊词元，按出现的次序。"""
        parts = [p for role in self.roles.values() for p in (*role.before, *role.after)]
        found = [*self.start, *(p.text for p in parts if isinstance(p, Special)), *self.stop]
        yield from dict.fromkeys(found)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return tuple(tokenizer.special_tokens[text] for text in self.stop)

    def check(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            ValueError: 分词器没有模板要的特殊词元。
        """
        missing = [text for text in self.specials() if text not in tokenizer.special_tokens]
        if missing:
            raise ValueError(
                f"template {self.name} needs the special tokens {', '.join(missing)}, which the "
                f"tokenizer does not have: add them with --special {','.join(missing)}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "start": list(self.start),
            "roles": {
                name: {
                    "before": [_written(part) for part in role.before],
                    "after": [_written(part) for part in role.after],
                    "scored": role.scored,
                }
                for name, role in self.roles.items()
            },
            "stop": list(self.stop),
        }

    def serialised(self) -> bytes:
        return (json.dumps(self.to_json(), indent=2, ensure_ascii=True) + "\n").encode("ascii")

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_atomic(Path(folder) / CHAT_FILE, self.serialised())

    def fingerprint(self) -> str:
        return hashlib.sha256(self.serialised()).hexdigest()


def builtin(name: str, tokenizer: Tokenizer) -> Template:
    """现成的模板；收尾用分词器的分隔符，chatml 用它自己的记号。

    chatml 另立记号（openai/openai-python 的 chatml.md）；alpaca 只用文字；plain 什么也不加，
    给 prompt 与 completion 自带间隔的数据。

    Raises:
        ValueError: 没有这个名字，或分词器没有分隔符。
    """
    names = {i: text for text, i in tokenizer.special_tokens.items()}
    start = tuple(names[i] for i in tokenizer.document_start)
    if name == "chatml":
        begin, end = Special("<|im_start|>"), Special("<|im_end|>")
        roles = {
            role: Role((begin, role + "\n"), (end, "\n"), scored=role == "assistant")
            for role in ("system", "user", "assistant")
        }
        return Template(name, start, roles, (end.text,))
    if name not in NAMES:
        raise ValueError(f"chat template {name!r} is not one of {', '.join(NAMES)}")
    if tokenizer.document_separator is None:
        raise ValueError(
            f"template {name} ends a turn with the tokenizer's document separator, but this "
            f"{tokenizer.kind} tokenizer has none: use --chat chatml"
        )
    stop = Special(names[tokenizer.document_separator])
    if name == "plain":
        roles = {"system": Role((), ()), "user": Role((), ()), "assistant": Role((), (stop,), True)}
    else:
        roles = {
            "system": Role((), ("\n\n",)),
            "user": Role(("### Instruction:\n",), ("\n\n",)),
            "assistant": Role(("### Response:\n",), (stop,), True),
        }
    return Template(name, start, roles, (stop.text,))


def find_template(folder: str | os.PathLike[str]) -> Template | None:
    """文件夹里的模板；没有就是 None。

    Raises:
        ValueError: 文件坏了。
    """
    path = Path(folder) / CHAT_FILE
    if not path.is_file():
        return None
    data = parse_json(read_limited(path), str(path))
    try:
        version = data["schema_version"]
        template = Template(
            data["name"],
            _texts(data["start"]),
            {
                name: Role(_parts(role["before"]), _parts(role["after"]), role["scored"] is True)
                for name, role in data["roles"].items()
            },
            _texts(data["stop"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a chat template ({error!r}): {_PREPARE}") from None
    if version != SCHEMA_VERSION or template.to_json() != data:
        raise ValueError(
            f"{path}: schema_version={version!r} or a field that this version does not know "
            f"(it reads {SCHEMA_VERSION}): update the package, or {_PREPARE}"
        )
    return template


def load_chat(folder: str | os.PathLike[str]) -> tuple[Template, Tokenizer]:
    """文件夹里的模板与分词器，两者相合。

    Raises:
        ValueError: 没有模板：模型不是用对话训练的。
    """
    template, tokenizer = find_template(folder), load_tokenizer(folder)
    if template is None:
        raise ValueError(
            f"{folder}: no {CHAT_FILE} there, so this model was not trained on conversations: "
            "fine-tune it on data prepared with --chat"
        )
    template.check(tokenizer)
    return template, tokenizer


def _written(part: Part) -> Any:
    return {"special": part.text} if isinstance(part, Special) else part


def _parts(given: Any) -> tuple[Part, ...]:
    return tuple(part if isinstance(part, str) else Special(part["special"]) for part in given)


def _texts(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise TypeError(f"{given!r} is not a list of texts")
    return tuple(given)

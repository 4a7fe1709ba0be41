"""对话 -> 词元：训练时的模板（chat.json），或一份 Jinja，在沙箱里。"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from app.data.chat.encode import Turn, encode_prompt
from app.data.chat.template import Template
from app.data.tokenizers import Tokenizer
from app.serving.api.errors import ApiError, wrong
from app.serving.api.fields import Message

if TYPE_CHECKING:
    from jinja2 import Template as Compiled


@dataclass(frozen=True)
class Jinja:
    """别处的模板，或 --chat-template。

    Raises:
        ValueError: 没有 jinja2，或不是模板。
    """

    source: str

    def __post_init__(self) -> None:
        check(self.source)

    def ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        return _render(self.source, messages, tokenizer)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Own:
    """模型训练时用的：词元与 gpt2 chat 的、与训练数据的相同。"""

    template: Template
    source: str | None = None

    def ids(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """
        Raises:
            ApiError: 400：模板没有这个角色，或分词器写不出。
        """
        roles = self.template.roles
        if any(message.role not in roles for message in messages):
            raise wrong("messages", f"a role is not one of {', '.join(roles)}")
        turns = [Turn(message.role, message.content) for message in messages]
        try:
            return encode_prompt(turns, self.template, tokenizer)
        except ValueError:
            raise wrong("messages", "the tokenizer of this model cannot encode them") from None

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return self.template.stop_ids(tokenizer)


def _render(source: str, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """模板里的 eos_token 成为分隔符；用户写的 `<|endoftext|>` 仍是文字。

    Raises:
        ApiError: 400：模板不收这些话，或分词器写不出。
    """
    # 用户猜不到的记号占着特殊词元的位置，编码之后才换成它的号。
    mark = f"\ue000{secrets.token_hex(16)}\ue001"
    given = [message.model_dump(exclude_none=True) for message in messages]
    try:
        text = _compiled(source).render(
            messages=given, eos_token=mark, bos_token=mark, add_generation_prompt=True
        )
    except ApiError:
        raise
    except Exception:
        raise wrong("messages", "the chat template does not accept these messages") from None
    ids: list[int] = list(tokenizer.start_ids)
    separator = tokenizer.document_separator
    try:
        for i, part in enumerate(text.split(mark)):
            if i and separator is not None:
                ids.append(separator)
            ids += tokenizer.encode(part) if part else []
    except ValueError:
        raise wrong("messages", "the tokenizer of this model cannot encode them") from None
    return ids or [tokenizer.boundary_id]


def check(source: str) -> None:
    """
    Raises:
        ValueError: 没有 jinja2，或不是模板。
    """
    try:
        _compiled(source)
    except ImportError:
        raise ValueError(
            "a chat template needs jinja2: pip install 'gpt2-workbench[serve]'"
        ) from None
    except Exception as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from None


@cache
def _compiled(source: str) -> Compiled:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.globals["raise_exception"] = _refuse
    return env.from_string(source)


def _refuse(message: Any) -> NoReturn:
    raise wrong("messages", "the chat template refuses these messages")

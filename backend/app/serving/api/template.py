"""对话 -> 词元：模型自己的 Jinja 模板，在沙箱里。"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from app.data.tokenizers import Tokenizer
from app.serving.api.errors import ApiError, wrong
from app.serving.api.fields import Message

if TYPE_CHECKING:
    from jinja2 import Template


def render(source: str, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
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
def _compiled(source: str) -> Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.globals["raise_exception"] = _refuse
    return env.from_string(source)


def _refuse(message: Any) -> NoReturn:
    raise wrong("messages", "the chat template refuses these messages")

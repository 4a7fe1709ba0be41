"""生成的测试共用的：只要词元，设置写成关键字。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.generation.config import Options
from app.generation.generate import complete
from app.generation.row import Callbacks, Completion

_CALLS = ("on_token", "on_text", "on_finish")
_CALL = ("tokenizer", "seeds", "names")


def completions(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Completion]:
    """complete；settings 是它的、Options 的与 Callbacks 的关键字，混在一起。"""
    calls = Callbacks(**{name: settings.pop(name) for name in _CALLS if name in settings})
    given = {name: settings.pop(name) for name in _CALL if name in settings}
    return complete(model, prompts, Options(**settings), calls=calls, **given)


def new_tokens(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    return [done.tokens for done in completions(model, prompts, **settings)]

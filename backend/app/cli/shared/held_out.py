"""要打分的数据从哪里来：eval 与 experts 共用的 --data、--text、--text-key。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from app.cli.shared.trained import Trained, own_data
from app.common.tell import to_stderr

if TYPE_CHECKING:
    from app.evaluation.perplexity import HeldOut


class Asked(Protocol):
    """用到的那几个选项。"""

    @property
    def data(self) -> Path | None: ...

    @property
    def text(self) -> Path | None: ...

    @property
    def text_key(self) -> str | None: ...

    @property
    def batch_size(self) -> int: ...


def check_held_out(args: Asked) -> None:
    """
    Raises:
        ValueError: 选项互相矛盾，或有一个用不上。
    """
    if args.data is not None and args.text is not None:
        raise ValueError(f"data={args.data} and text={args.text} are both given: leave one out")
    if args.text_key is not None and args.text is None:
        raise ValueError(f"text_key={args.text_key!r} is for --text, which is not given")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be at least 1")


def held_out(args: Asked, trained: Trained, instead: str) -> HeldOut:
    """
    Args:
        instead: 没有给数据、模型又不属于哪次训练时，说该给哪些选项。

    Raises:
        ValueError: 数据读不懂，或不是用模型的分词器写的。
    """
    from app.evaluation.perplexity import open_dataset, open_text

    if args.text is not None:
        return open_text(args.text, trained.tokenizer, args.text_key)
    folder = args.data or own_data(trained.folder, instead)
    found = open_dataset(folder, trained.tokenizer)
    if found.kind != "text":
        to_stderr(
            f"note: {found.name} holds {found.kind} examples: every token is scored here, the "
            "questions too, while training scores the answers alone (see its report)"
        )
    return found

"""原样的文件变成 RUN/data，用模型自己的分词器；被打断的同一条命令接着做。"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.data.chat.forms import detect, parse_columns
from app.data.chat.prepare import ChatSpec, prepare_examples
from app.data.chat.template import Template
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Reading, Sources
from app.data.tokenizers import Tokenizer

Say = Callable[[str], None]
_VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Raw:
    """
    Attributes:
        val: 验证用的文件，或要留出的份额；None = 0.1。
        columns: `new=old` 的各项。
        chat: 对话模板的名字；None = known（模型已会的），没有就按写法选。
        context: 对话至多多长，更长的不要，或从前面剪短（long）。
    """

    source: str
    val: str | None
    columns: Sequence[str]
    chat: str | None
    known: Template | None
    context: int
    cut: bool


def prepare_raw(raw: Raw, out: Path, tokenizer: Tokenizer, tell: Say) -> None:
    """写 out/train 与 out/val；已经写好就不再写。

    Raises:
        ValueError: 读不懂，点名文件与行；这时 out 里没有留下东西。
    """
    fresh = not out.exists()
    try:
        _prepare(raw, out, tokenizer, tell)
    except ValueError:
        if fresh:
            remove_data(out)
        raise


def remove_data(out: Path) -> None:
    """刚写下而用不上的，连同空了的 RUN；别的文件不动。"""
    shutil.rmtree(out, ignore_errors=True)
    if out.parent.is_dir() and not any(out.parent.iterdir()):
        out.parent.rmdir()


def _prepare(raw: Raw, out: Path, tokenizer: Tokenizer, tell: Say) -> None:
    columns = parse_columns(raw.columns)
    val, fraction = _validation(raw.val)
    spec = TokenizerSpec.of(tokenizer)
    form = detect((raw.source,), (), "auto", columns)
    if form is None or form.kind == "text":
        _check_text(raw, columns)
        reading = Reading(text_key=columns.get("text"))
        prepare(
            Sources((raw.source,), reading), out, spec,
            val=None if val is None else Sources((val,), reading),
            val_fraction=fraction, say=tell,
        )  # fmt: skip
        return
    reading = Reading(form=str(form))
    prepare_examples(
        Sources((raw.source,), reading), out, spec,
        ChatSpec(
            form, raw.chat, columns, raw.context, "cut-prompt" if raw.cut else "drop", raw.known
        ),
        val=None if val is None else Sources((val,), reading),
        val_fraction=fraction, say=tell,
    )  # fmt: skip


def _check_text(raw: Raw, columns: dict[str, str]) -> None:
    if raw.chat is not None:
        raise ValueError(
            f"--chat {raw.chat} but {raw.source} holds plain text and no conversations: leave "
            "--chat out, or name the columns of the questions and answers with --columns"
        )
    if columns.keys() - {"text"}:
        raise ValueError(
            f"--columns {','.join(raw.columns)} but {raw.source} holds plain text: only text=OLD "
            "can be used there"
        )


def _validation(given: str | None) -> tuple[str | None, float]:
    """(文件, 份额)。

    Raises:
        ValueError: 既不是份额，也没有这个文件。
    """
    if given is None:
        return None, _VAL_FRACTION
    try:
        fraction = float(given)
    except ValueError:
        if not Path(given).exists():
            raise ValueError(
                f"--val {given} is neither a file nor a fraction such as 0.1"
            ) from None
        return given, 0.0
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"--val {given} must be at least 0 and below 1, or a file")
    return None, fraction

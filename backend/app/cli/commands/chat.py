"""`gpt2 chat`：在终端里与模型说话。标准输出只有它的回答，其余都在标准错误。"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from app.cli.shared.knobs import Knobs
from app.cli.shared.trained import Device, IdleThreads, TrainedName, load_trained
from app.common.tell import to_stderr
from app.common.waiting import settle_waiting
from app.generation.config import Options

if TYPE_CHECKING:
    from app.generation.conversation import Answer, Conversation

SUMMARY = (
    "talk to a model that was tuned on conversations; answers go to stdout, the rest to stderr"
)
EXAMPLES = """\
  gpt2 chat runs/answers/best
  gpt2 chat runs/answers --system "You answer in one sentence." --temperature 0.3
  gpt2 chat models/answers --greedy < questions.txt > answers.txt

A line is a message. /help lists what else can be typed; Ctrl-C stops an answer, twice leaves."""

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation, keep the system text",
    "/undo": "forget the last question and its answer",
    "/exit": "leave (also Ctrl-D)",
}
_MOST_NEW = 512
_SHOWN = 40
_WHY = {
    "interrupted": "stopped by Ctrl-C; what it said so far stays in the conversation",
    "length": "cut: it reached --max-new-tokens or the end of the context",
}


@dataclass(frozen=True)
class Args(Knobs):
    """`gpt2 chat` 的选项。"""

    model: TrainedName
    system: Annotated[str | None, Doc("said before the conversation; None = nothing")] = None
    max_new_tokens: Annotated[int, Doc("longest answer, in tokens")] = _MOST_NEW
    seed: Annotated[int, Doc("answer i uses seed + i")] = 0
    waiting: IdleThreads = "auto"
    device: Device = "auto"


def run(args: Args) -> int:
    """
    Raises:
        ValueError: 不是用对话训练的模型，或选项的值不对；来自管道的话放不下。
    """
    options = Options(
        max_new_tokens=args.max_new_tokens,
        sampling=args.sampling(),
        kv_dtype=args.kv_dtype,
    )
    settle_waiting(args.waiting, serving=False)
    from app.data.chat.template import load_chat
    from app.generation.conversation import Conversation

    trained = load_trained(args.model, args.device)
    template, tokenizer = load_chat(trained.folder)
    talk = Conversation(trained.model, tokenizer, template, options, args.system)
    if sys.stdin.isatty():
        to_stderr(f"{trained.folder}, template {template.name}; /help for help, Ctrl-D leaves")
        return _Terminal(talk, args.seed).run()
    for number, line in enumerate(_lines()):
        if not _obeyed(talk, line) and _ask(talk, line, args.seed + number).ended == "interrupted":
            raise KeyboardInterrupt
    return 0


def _lines() -> Iterator[str]:
    """管道里的各行；空行不算，/exit 到此为止。"""
    for line in sys.stdin:
        text = line.rstrip("\r\n")
        if text.strip() == "/exit":
            return
        if text.strip():
            yield text


class _Terminal:
    """有人在的时候：Ctrl-C 停下回答，再按一次离开。"""

    def __init__(self, talk: Conversation, seed: int) -> None:
        self._talk, self._seed = talk, seed

    def run(self) -> int:
        # 有了它 input 才能用方向键；没有的系统照样能打字。
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        warned = False
        while True:
            try:
                text = input("> ")
            except EOFError:
                to_stderr("")
                return 0
            except KeyboardInterrupt:
                to_stderr("")
                if warned:
                    return 0
                to_stderr("Ctrl-C again leaves")
                warned = True
                continue
            warned = False
            if text.strip() == "/exit":
                return 0
            if text.strip():
                warned = self._turn(text)

    def _turn(self, text: str) -> bool:
        """答完了；被 Ctrl-C 打断的是 True。"""
        try:
            if _obeyed(self._talk, text):
                return False
            self._seed += 1
            return _ask(self._talk, text, self._seed - 1).ended == "interrupted"
        except ValueError as error:
            to_stderr(f"error: {error}")
            return False


def _ask(talk: Conversation, text: str, seed: int) -> Answer:
    """
    Raises:
        ValueError: 见 Conversation.ask。
    """
    text = text.removeprefix("/") if text.startswith("//") else text
    answer = talk.ask(text, seed, _write)
    _write("\n")
    if answer.dropped:
        first = answer.dropped[0].content
        shown = first if len(first) <= _SHOWN else first[: _SHOWN - 1] + "…"
        to_stderr(
            f"note: the context was full: forgot the oldest {len(answer.dropped) // 2} questions "
            f"and their answers, from {shown!r} on"
        )
    if answer.ended in _WHY:
        to_stderr(f"note: {_WHY[answer.ended]}")
    return answer


def _obeyed(talk: Conversation, text: str) -> bool:
    """以 / 开头的命令做了；// 开头的是一句以 / 开头的话。

    Raises:
        ValueError: 没有这个命令。
    """
    word = text.strip()
    if not word.startswith("/") or word.startswith("//"):
        return False
    if word == "/help":
        for name, what in COMMANDS.items():
            to_stderr(f"  {name:<8}{what}")
        to_stderr("  //...   a message that begins with /")
    elif word == "/reset":
        talk.reset()
        to_stderr("forgotten")
    elif word == "/undo":
        to_stderr("forgot the last question" if talk.undo() else "nothing to undo")
    else:
        close = difflib.get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "/help lists them"
        raise ValueError(f"unknown command {word!r}: {hint} A message that begins with / is //...")
    return True


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

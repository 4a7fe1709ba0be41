"""与模型的一段对话：喂的词元就是训练的（研究里的试验 11）；满了丢最早的，说丢了哪些；Ctrl-C。"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from app.cli.commands.chat import _Terminal
from app.data.chat.encode import Turn, encode_conversation
from app.data.chat.template import NAMES, Template, builtin
from app.data.tokenizers import ByteTokenizer, Tokenizer
from app.generation import conversation as module
from app.generation.config import Options, SamplingConfig
from app.generation.conversation import Conversation
from app.generation.row import Callbacks, Completion
from app.models.transformer import GPT2Config, GPT2Model

WORDS = [
    "hello",
    "<|im_start|>user",
    "<|im_end|>",
    "ünï\ncode",
    " spaced ",
    "日本",
    "### Response:",
]


def made(name: str) -> tuple[Template, Tokenizer]:
    plain = ByteTokenizer()
    template = builtin(name, plain)
    return template, plain.with_special(template.specials())


@cache
def model_of(context: int) -> GPT2Model:
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=264, context_size=context, n_layer=1, n_head=1, n_embed=8)
    return GPT2Model(shape).eval()


def talk_with(
    name: str, context: int = 256, system: str | None = None, most: int = 20
) -> Conversation:
    template, tokenizer = made(name)
    options = Options(max_new_tokens=most, sampling=SamplingConfig(temperature=0.0))
    return Conversation(model_of(context), tokenizer, template, options, system)


def scripted(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[list[int]]:
    """complete 的替身：照稿回答，记下喂的词元。"""
    fed, script = list[list[int]](), iter(answers)

    def complete(
        model: Any, prompts: Any, options: Any, *, calls: Callbacks, **_: Any
    ) -> list[Completion]:
        fed.append(list(prompts[0]))
        text = next(script)
        assert calls.on_text is not None
        calls.on_text(0, text)
        return [Completion([], "stop", text)]

    monkeypatch.setattr(module, "complete", complete)
    return fed


@pytest.mark.parametrize("name", NAMES)
def test_chat_feeds_the_ids_of_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """五十段、一到六轮、有无 system、写着特殊记号的话：每次喂的都是训练词元的开头。"""
    template, tokenizer = made(name)
    chance = random.Random(0)
    for number in range(50):
        count = chance.randint(1, 6)
        asked = [" ".join(chance.choices(WORDS, k=3)) for _ in range(count)]
        answers = [chance.choice(WORDS) for _ in range(count)]
        system = chance.choice(WORDS) if number % 2 else None
        fed = scripted(monkeypatch, answers)
        talk = talk_with(name, 4096, system)
        turns = [] if system is None else [Turn("system", system)]
        for i, (ask, answer) in enumerate(zip(asked, answers, strict=True)):
            talk.ask(ask, 0, lambda piece: None)
            turns += [Turn("user", ask), Turn("assistant", answer)]
            whole, scored = encode_conversation(turns, template, tokenizer)
            start = len(fed[i])
            assert fed[i] == whole[:start].tolist()
            # 喂的到回答的头一个计分的词元为止，不多不少。
            assert scored[start] and not scored[start - 1] if start else True


def test_a_full_context_forgets_the_oldest_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = scripted(monkeypatch, ["one", "two", "three"])
    talk = talk_with("chatml", 160, "sys")
    first = talk.ask("first question " * 3, 0, lambda piece: None)
    assert first.dropped == ()
    second = talk.ask("second question " * 3, 0, lambda piece: None)
    assert [turn.content for turn in second.dropped] == ["first question " * 3, "one"]
    assert [turn.content for turn in talk.turns] == ["second question " * 3, "two"]
    assert len(fed[1]) + 20 <= 160 and "sys" in made("chatml")[1].decode(fed[1])
    with pytest.raises(ValueError, match=r"alone is \d+ tokens"):
        talk.ask("x" * 300, 0, lambda piece: None)
    # 问不成的一句不留在对话里，别的也没有丢。
    assert [turn.content for turn in talk.turns] == ["second question " * 3, "two"]


def test_undo_and_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ["one", "two"])
    talk = talk_with("chatml")
    before = talk.prompt()
    talk.ask("a", 0, lambda piece: None)
    middle = talk.prompt()
    talk.ask("b", 0, lambda piece: None)
    assert talk.undo() and talk.prompt() == middle
    talk.reset()
    assert talk.prompt() == before and not talk.undo()


def test_ctrl_c_keeps_what_was_said() -> None:
    talk, said = talk_with("chatml"), list[str]()

    def hear(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    answer = talk.ask("hello", 0, hear)
    assert answer.ended == "interrupted" and answer.text == "".join(said) and len(said) == 3
    assert talk.turns[-1].content == answer.text
    again = talk.ask("more", 0, lambda piece: None)
    assert again.ended in ("stop", "length")


class Typed:
    """终端前的人：照稿打字；KeyboardInterrupt 是按下了 Ctrl-C，打完了是 Ctrl-D。"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        monkeypatch.setattr("builtins.input", self)

    def __call__(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def test_commands_and_ctrl_c_at_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, ["one", "two"])
    talk = talk_with("chatml")
    Typed(monkeypatch, "/help", "a", "/udno", "//b", "/undo", "")
    assert _Terminal(talk, 0).run() == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "/reset" in err and "did you mean /undo?" in err and "forgot the last question" in err
    assert [turn.content for turn in talk.turns] == ["a", "one"]
    # 一次 Ctrl-C 只提醒；隔着一句话的两次不算两次；连着两次才走。
    scripted(monkeypatch, ["three"])
    typed = Typed(monkeypatch, KeyboardInterrupt, "c", KeyboardInterrupt, KeyboardInterrupt, "d")
    assert _Terminal(talk, 0).run() == 0
    assert typed("") == "d" and talk.turns[-2].content == "c"


def test_ctrl_c_in_an_answer_then_again_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complete(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "complete", complete)
    typed = Typed(monkeypatch, "a", KeyboardInterrupt, "never")
    assert _Terminal(talk_with("chatml"), 0).run() == 0
    assert typed("") == "never" and "stopped by Ctrl-C" in capsys.readouterr().err

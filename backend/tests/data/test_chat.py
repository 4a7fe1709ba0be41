"""对话写成词元：界线由构造保证，收尾计分，用户写的记号只是文字，生成时的词元就是训练时的。"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from app.data.chat.encode import Encoder, Turn, encode_conversation, encode_prompt
from app.data.chat.shorten import shortened
from app.data.chat.template import (
    NAMES,
    Role,
    Special,
    Template,
    builtin,
    find_template,
    load_chat,
)
from app.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

TEXT = (
    "What is the capital of France? The capital is Paris.\n\nTell me more, please. "
    "### Instruction: user assistant system <|im_start|> <|im_end|> <|endoftext|> 你好 é 🙂 "
)
CHARACTERS = "".join(sorted({*TEXT, *map(chr, range(32, 127)), "\n", "中", "文"}))


def conversations(count: int = 50) -> list[list[Turn]]:
    """一到六轮，有或没有 system，各种文字，空的回答，用户写着的特殊记号。"""
    draw = random.Random(0)
    words = [*TEXT.split(" "), "\n", "  ", "\n\nx", "中文", "<|user|>", "'s"]

    def text(least: int = 1) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randrange(least, 12)))

    result = []
    for _ in range(count):
        turns = [Turn("system", text())] if draw.random() < 0.4 else []
        for _ in range(draw.randrange(1, 7)):
            turns += [Turn("user", text()), Turn("assistant", text(0))]
        result.append(turns)
    return result


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe([TEXT] * 50, 330)


def ready(name: str, tokenizer: Tokenizer) -> tuple[Template, Tokenizer]:
    template = builtin(name, tokenizer)
    return template, tokenizer.with_special(template.specials())


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_exact(name: str, kind: str, bpe: BPETokenizer) -> None:
    """慢的孪生：一句一句地写，回答与其后的收尾计分，此外都不计。"""
    plain = {"bytes": ByteTokenizer(), "chars": CharTokenizer(CHARACTERS), "bpe": bpe}[kind]
    template, tokenizer = ready(name, plain)
    special = tokenizer.special_tokens
    stop = special[template.stop[0]]
    for turns in conversations():
        ids, scored = encode_conversation(turns, template, tokenizer)
        answers = [turn.content for turn in turns if turn.role == "assistant"]
        # 计分的各段恰好是各个回答加收尾
        borders = np.flatnonzero(np.diff(scored.astype(int), prepend=0, append=0)).reshape(-1, 2)
        assert len(borders) == len(answers)
        for (start, end), answer in zip(borders, answers, strict=True):
            wanted = [*tokenizer.encode(answer), stop] if answer else [stop]
            assert ids[start:end].tolist() == wanted
        # 特殊词元只来自模板：文字里写着的一个也没有
        marks = sum(isinstance(part, Special) for t in turns for part in parts(template, t))
        assert np.isin(ids, list(special.values())).sum() == marks
        rest = tokenizer.decode(ids[~scored])
        for turn in turns:
            if turn.role != "assistant":
                assert turn.content in rest


def parts(template: Template, turn: Turn) -> tuple[str | Special, ...]:
    role = template.roles[turn.role]
    return (*role.before, *role.after)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_start_of_the_conversation(name: str, kind: str, bpe: BPETokenizer) -> None:
    plain = {"bytes": ByteTokenizer(), "chars": CharTokenizer(CHARACTERS), "bpe": bpe}[kind]
    template, tokenizer = ready(name, plain)
    for turns in conversations():
        ids, scored = encode_conversation(turns, template, tokenizer)
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                prompt = encode_prompt(turns[:i], template, tokenizer)
                assert ids[: len(prompt)].tolist() == prompt
                assert scored[len(prompt)] and not scored[len(prompt) - 1]


def test_chatml_by_hand() -> None:
    template, tokenizer = ready("chatml", ByteTokenizer())
    assert tokenizer.special_tokens == {
        "<|endoftext|>": 256,
        "<|im_start|>": 257,
        "<|im_end|>": 258,
    }
    turns = [Turn("user", "<|im_end|>"), Turn("assistant", "ok")]
    ids, scored = encode_conversation(turns, template, tokenizer)
    wanted = [257, *b"user\n<|im_end|>", 258, 10, 257, *b"assistant\n", *b"ok", 258, 10]
    assert ids.tolist() == wanted
    assert np.flatnonzero(scored).tolist() == [len(wanted) - 4, len(wanted) - 3, len(wanted) - 2]


def test_an_answer_can_be_left_unscored() -> None:
    template, tokenizer = ready("plain", ByteTokenizer())
    turns = [Turn("user", "a"), Turn("assistant", "b", scored=False), Turn("assistant", "c")]
    ids, scored = encode_conversation(turns, template, tokenizer)
    assert ids.tolist() == [97, 98, 256, 99, 256]
    assert scored.tolist() == [False, False, False, True, True]
    with pytest.raises(ValueError, match=r"role 'tool' is not one of .*system, user, assistant"):
        encode_conversation([Turn("tool", "x")], template, tokenizer)


def test_a_template_whose_end_is_unscored_is_refused() -> None:
    user, end = Role(("Q: ",), ("\n",)), "<|endoftext|>"
    with pytest.raises(ValueError, match="the model would never stop"):
        Template("mine", (), {"user": user, "assistant": Role((), ("\n",), True)}, (end,))
    with pytest.raises(ValueError, match="no role is scored"):
        Template("mine", (), {"user": user, "assistant": Role((), (Special(end),))}, (end,))


def test_special_tokens_the_tokenizer_lacks_are_named() -> None:
    template = builtin("chatml", ByteTokenizer())
    with pytest.raises(ValueError, match=r"--special <\|im_start\|>,<\|im_end\|>"):
        Encoder(template, ByteTokenizer())
    with pytest.raises(ValueError, match=r"'mine' is not one of chatml, alpaca, plain"):
        builtin("mine", ByteTokenizer())
    with pytest.raises(ValueError, match="this chars tokenizer has none: use --chat chatml"):
        builtin("alpaca", CharTokenizer("ab", separator=False))


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_stored(name: str, tmp_path: Path) -> None:
    template, tokenizer = ready(name, ByteTokenizer())
    assert find_template(tmp_path) is None
    template.save(tmp_path)
    tokenizer.save(tmp_path)
    known, read = load_chat(tmp_path)
    assert known == template and known.fingerprint() == template.fingerprint()
    assert read.fingerprint() == tokenizer.fingerprint()
    data = json.loads((tmp_path / "chat.json").read_text())
    for change in ({"schema_version": 2}, {"roles": {}}, {"stop": "x"}, {"more": 1}):
        (tmp_path / "chat.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=r"chat\.json|no role is scored"):
            find_template(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_added_special_tokens(kind: str, bpe: BPETokenizer, tmp_path: Path) -> None:
    plain = {"bytes": ByteTokenizer(), "chars": CharTokenizer(CHARACTERS), "bpe": bpe}[kind]
    one = plain.with_special(["<|a|>", "<|b|>", "<|a|>"])
    size = plain.vocab_size
    assert one.special_tokens["<|a|>"] == size and one.special_tokens["<|b|>"] == size + 1
    assert one.vocab_size == size + 2
    assert one.with_special(["<|b|>"]) is one and one.fingerprint() != plain.fingerprint()
    text = f"<|a|> {TEXT}"
    # 文本里写着的仍是文字，原来的编码一个也不变
    assert one.encode(text) == plain.encode(text)
    assert one.decode([size, *one.encode("x")]) == "<|a|>x"
    assert one.byte_length([size, *one.encode("x")]) == 1
    one.save(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.fingerprint() == one.fingerprint()
    assert read.special_tokens == one.special_tokens
    assert read.encode(text) == one.encode(text)
    with pytest.raises(ValueError, match="special token 'x'"):
        plain.with_special(["x"])


ROUND = [Turn("user", "old question"), Turn("assistant", "old answer")]
LAST = [Turn("user", "a long long question"), Turn("assistant", "the answer")]
SYSTEM = [Turn("system", "be brief")]


def cut(turns: list[Turn], limit: int) -> str | None:
    template, tokenizer = ready("chatml", ByteTokenizer())
    fitted = shortened(Encoder(template, tokenizer), [turns], limit)
    if fitted is None:
        return None
    ids, scored = fitted[0]
    assert len(ids) <= limit
    # 最后的回答与收尾总是完整的
    assert tokenizer.decode(ids[scored]).endswith("the answer<|im_end|>")
    return tokenizer.decode(ids)


def test_long_conversations_lose_their_front() -> None:
    full = cut([*SYSTEM, *ROUND, *ROUND, *LAST], 10_000)
    assert full is not None and full.count("old question") == 2
    template, tokenizer = ready("chatml", ByteTokenizer())

    def expected(turns: list[Turn]) -> str:
        return tokenizer.decode(encode_conversation(turns, template, tokenizer)[0])

    def length(turns: list[Turn]) -> int:
        return len(encode_conversation(turns, template, tokenizer)[0])

    two = [*SYSTEM, *ROUND, *LAST]
    assert cut([*SYSTEM, *ROUND, *ROUND, *LAST], length(two)) == expected(two)
    one = [*SYSTEM, *LAST]
    assert cut([*SYSTEM, *ROUND, *ROUND, *LAST], length(two) - 1) == expected(one)
    # 再短，就从最后一问的开头剪
    wanted = expected([*SYSTEM, Turn("user", "long question"), LAST[1]])
    assert cut([*SYSTEM, *ROUND, *LAST], length(one) - 7) == wanted
    shortest = length([*SYSTEM, Turn("user", "n"), LAST[1]])
    assert cut([*SYSTEM, *ROUND, *LAST], shortest) is not None
    # 问题一个词元也不剩：整段放弃，回答从不剪
    assert cut([*SYSTEM, *ROUND, *LAST], shortest - 1) is None
    short = [Turn("user", "why?"), Turn("assistant", "because " * 9 + "the answer")]
    assert cut(short, length(short) - 3) is not None
    assert cut(short, length(short) - 10) is None


def test_both_sides_of_a_preference_keep_the_same_question() -> None:
    template, tokenizer = ready("plain", ByteTokenizer())
    encoder = Encoder(template, tokenizer)
    asked = [Turn("user", "abcdefgh", scored=False)]
    sides = [[*asked, Turn("assistant", "xyz")], [*asked, Turn("assistant", "no")]]
    fitted = shortened(encoder, sides, 9)
    assert fitted is not None
    assert [tokenizer.decode(ids) for ids, _ in fitted] == [
        "defghxyz<|endoftext|>",
        "defghno<|endoftext|>",
    ]

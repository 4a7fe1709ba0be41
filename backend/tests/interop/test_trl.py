"""TRL 的 SFTTrainer 读同样的对话：id、掩码与损失都相同；它连起来编码而不同的行列出来。"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data.chat.encode import Encoder, Turn
from app.data.chat.template import NAMES, builtin
from app.data.tokenizers import train_bpe
from tests.data.test_chat import conversations

from .test_chat_template import BPE, clean, written

pytest.importorskip("trl", reason="pip install --no-deps trl")
pytest.importorskip("datasets")
pytestmark = pytest.mark.slow
Row = tuple[list[int], list[bool]]


def read_by_trl(folder: Path, rows: list[dict[str, Any]], **config: Any) -> list[Row]:
    """它的训练集里各行的 (id, 计不计分)；标签 -100 的不计分。"""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    theirs = AutoTokenizer.from_pretrained(folder)
    shape = GPT2Config(vocab_size=len(theirs) + 8, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    given = SFTConfig(
        output_dir=str(folder / "out"), max_length=None, packing=False, report_to=[],
        use_cpu=True, bf16=False, **config,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=GPT2LMHeadModel(shape), args=given, train_dataset=Dataset.from_list(rows),
        processing_class=theirs,
    )  # fmt: skip
    return [
        (row["input_ids"], [label != -100 for label in row["labels"]])
        for row in trainer.train_dataset
    ]


def messages(turns: list[Turn]) -> dict[str, Any]:
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}


def ours(encoder: Encoder, turns: list[Turn]) -> Row:
    ids, scored = encoder.conversation(turns)
    return ids.tolist(), scored.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_mask_are_those_of_trl(name: str, tmp_path: Path) -> None:
    """一到六轮的 50 段，有或没有 system；空的回答也在内。"""
    template = builtin(name, BPE)
    tokenizer = BPE.with_special(template.specials())
    rows = [clean(turns) for turns in conversations(50)]
    if name == "plain":
        rows = [[Turn(t.role, " " + t.content) for t in turns] for turns in rows]
    else:
        rows[7][-1] = Turn("assistant", "")
    encoder = Encoder(template, tokenizer)
    found = read_by_trl(
        written(tmp_path, template, tokenizer), [*map(messages, rows)], assistant_only_loss=True
    )
    assert found == [ours(encoder, turns) for turns in rows]
    assert {len(turns) // 2 for turns in rows} == set(range(1, 7))


def test_special_text_of_a_user_is_the_one_difference(tmp_path: Path) -> None:
    """原样的 50 段：写着特殊记号的，或两头的空白让两段文字粘在一起的，才可以不同；点名每一行。"""
    template = builtin("chatml", BPE)
    tokenizer = BPE.with_special(template.specials())
    rows, encoder = conversations(50), Encoder(template, tokenizer)
    found = read_by_trl(
        written(tmp_path, template, tokenizer), [*map(messages, rows)], assistant_only_loss=True
    )
    different = [i for i, turns in enumerate(rows) if found[i] != ours(encoder, turns)]

    def may(turns: list[Turn]) -> bool:
        special = any(text in t.content for t in turns for text in tokenizer.special_tokens)
        return special or any(t.content != t.content.strip() for t in turns)

    print("rows that differ:", different)
    assert different and all(may(rows[i]) for i in different)
    # 那边多出的都是用户写着的记号：它们在这里只是文字。
    special = list(tokenizer.special_tokens.values())
    for i in different:
        theirs, mine = (
            int(np.isin(ids, special).sum()) for ids in (found[i][0], ours(encoder, rows[i])[0])
        )
        assert theirs >= mine


def test_joint_encoding_is_listed(tmp_path: Path) -> None:
    """提问与回答原样相接：TRL 连起来编码，界线上的词元会合并；这里从不合并。"""
    tokenizer = train_bpe(["ab abc abcd bcd cd " * 50], 270)
    template = builtin("plain", tokenizer)
    pairs = [("ab", " abc"), ("ab", "cd"), ("abc", "d"), ("bcd", " ab"), ("a", "b"), ("cd ", "ab")]
    encoder = Encoder(template, tokenizer)
    found = read_by_trl(
        written(tmp_path, template, tokenizer),
        [{"prompt": asked, "completion": answer} for asked, answer in pairs],
    )
    different = []
    for number, ((asked, answer), theirs) in enumerate(zip(pairs, found, strict=True)):
        turns = [Turn("user", asked), Turn("assistant", answer)]
        if theirs != ours(encoder, turns):
            different.append(number)
    merged = [
        i for i, (asked, answer) in enumerate(pairs)
        if tokenizer.encode(asked) + tokenizer.encode(answer) != tokenizer.encode(asked + answer)
    ]  # fmt: skip
    print("rows that differ:", different)
    assert different == merged and 0 < len(different) < len(pairs)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="pip install accelerate")
def test_losses_are_those_of_trl() -> None:
    """同样的例、权重、AdamW：三步的损失，装箱的与补齐的都是；TRL 自己补齐。"""
    from benchmarks.finetune import Size, trl
    from benchmarks.finetune import ours as step_of

    size = Size.of(tiny=True)
    packed, padded, theirs = (
        step_of("ours-packed", size),
        step_of("ours-padded", size),
        trl(size, 3),
    )
    for number in range(3):
        wanted = theirs(number)
        assert packed(number) == pytest.approx(wanted, abs=2e-6)
        assert padded(number) == pytest.approx(wanted, abs=2e-6)

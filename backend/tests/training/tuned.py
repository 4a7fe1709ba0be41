"""微调的试验共用：小的对话与偏好数据、教师、起点，与各种目标的设置。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.chat.template import builtin
from app.data.shards import Kind
from app.data.tokenizers import Tokenizer, load_tokenizer
from app.data.writer import ExampleWriter
from app.models.transformer import GPT2Model
from app.training.config import DataConfig, ObjectiveConfig, TrainConfig, TuneConfig

T = 8


def write_examples(folder: Path, tokenizer: Tokenizer, count: int, kind: Kind, seed: int) -> None:
    random = np.random.default_rng(seed)
    writer = ExampleWriter(folder, tokenizer, builtin("plain", tokenizer), kind, 64)
    for _ in range(count):
        length = int(random.integers(3, T + 2))
        tokens = random.integers(tokenizer.vocab_size, size=length).astype(np.uint32)
        writer.add_example(tokens, np.arange(length) >= max(1, length // 3), n_bytes=length)
    writer.finish({"description": "test"})


@pytest.fixture(scope="session")
def chats(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("chats"), load_tokenizer(dataset / "train")
    write_examples(folder / "train", tokenizer, 37, "chat", 0)
    write_examples(folder / "val", tokenizer, 9, "chat", 1)
    return folder


@pytest.fixture
def pairs(dataset: Path, tmp_path: Path) -> Path:
    """每个试验一份：参考存在它旁边。"""
    folder, tokenizer = tmp_path / "pairs", load_tokenizer(dataset / "train")
    write_examples(folder / "train", tokenizer, 22, "preference", 0)
    write_examples(folder / "val", tokenizer, 6, "preference", 1)
    return folder


@pytest.fixture(scope="session")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """一个宽度不同的小模型，连同数据的分词器。"""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(4)
    tokenizer = load_tokenizer(dataset / "train")
    GPT2Model(small(n_embed=8)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def base(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    GPT2Model(small()).save_pretrained(folder)
    load_tokenizer(dataset / "train").save(folder)
    return folder


def small(**changes: Any) -> Any:
    values = {"vocab_size": 32, "context_size": T, "n_layer": 2, "n_head": 2, "n_embed": 16}
    return TrainConfig().model.replace(dropout=0.0, **(values | changes))


@pytest.fixture
def modes(chats: Path, pairs: Path, teacher: Path, base: Path) -> dict[str, dict[str, Any]]:
    packed = DataConfig(folder=str(chats), pack=True)
    return {
        "pack, answers": {"data": packed},
        "apart": {"data": DataConfig(documents="apart", folder=str(chats))},
        "distill": {
            "data": packed,
            "objective": ObjectiveConfig(kind="distill", teacher=str(teacher), temperature=2.0),
        },
        "dpo": {
            "data": DataConfig(folder=str(pairs)), "model": small(), "init_from": str(base),
            "objective": ObjectiveConfig(kind="dpo", dpo_sft=0.1),
        },
        "lora": {
            "data": packed, "model": small(), "init_from": str(base),
            "tune": TuneConfig(trainable="lora", lora_rank=2, lora_dropout=0.2),
        },
        "dpo, lora": {
            "data": DataConfig(folder=str(pairs)), "model": small(), "init_from": str(base),
            "objective": ObjectiveConfig(kind="dpo"), "tune": TuneConfig(trainable="lora"),
        },
        "patience": {"data": packed, "patience": 9, "min_delta": 0.01, "eval_every": 1},
    }  # fmt: skip


MODES = ("pack, answers", "apart", "distill", "dpo", "lora", "dpo, lora", "patience")

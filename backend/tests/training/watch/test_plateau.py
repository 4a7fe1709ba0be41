"""一元平台：熵数得对，只在真停住时说，说一次。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data.shards import TokenDataset
from app.models.transformer import GPT2Config
from app.training.config import OptimConfig, ScheduleConfig, TrainConfig
from app.training.watch import plateau
from app.training.watch.plateau import NEAR, SAMPLE_TOKENS, WINDOW, PlateauWatch, unigram_entropy

from ..conftest import Make, train


class Tokens:
    """内存里的词元，只有取样用得着的那几样；记下读了多少。"""

    def __init__(self, ids: np.ndarray, vocab_size: int) -> None:
        self.ids, self.vocab_size, self.n_tokens, self.was_read = ids, vocab_size, len(ids), 0

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= self.n_tokens
        self.was_read += length
        return self.ids[start : start + length]


def zipf(vocab: int, count: int) -> tuple[Any, float]:
    share = 1 / np.arange(1, vocab + 1)
    share /= share.sum()
    ids = np.random.default_rng(0).choice(vocab, count, p=share)
    return Tokens(ids, vocab), float(-(share * np.log(share)).sum())


def test_entropy_of_few_tokens_is_exact() -> None:
    data: Any = Tokens(np.array([0, 0, 1, 1, 2, 2, 3, 3]), 9)
    # ln 4，另加取样的补偿 (4 - 1) / (2·8)。
    assert unigram_entropy(data) == pytest.approx(np.log(4) + 3 / 16, rel=1e-12)


def test_entropy_of_a_bounded_sample() -> None:
    """五万词的词表：读的不超过一百万左右，误差远小于判断的宽度。"""
    data, wanted = zipf(50_000, 1 << 21)
    found = unigram_entropy(data)
    assert data.was_read <= SAMPLE_TOKENS == 1 << 20
    assert found == pytest.approx(wanted, abs=NEAR / 5)


def test_sample_covers_the_whole_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """前半只有一种词元：只看开头会得到零。"""
    monkeypatch.setattr(plateau, "SAMPLE_TOKENS", 1 << 12)
    data: Any = Tokens(np.repeat([0, 1], 1 << 15), 2)
    assert unigram_entropy(data) == pytest.approx(np.log(2), abs=0.01)


def watch(**changes: Any) -> PlateauWatch:
    config = TrainConfig(
        model=GPT2Config(norm=changes.pop("norm", "post")),
        schedule=ScheduleConfig(warmup_steps=30),
        optim=OptimConfig(lr=3e-3),
    )
    return PlateauWatch(3.36, config)


def heard(losses: np.ndarray, **changes: Any) -> list[str]:
    each = watch(**changes)
    notes = [each.note(step, float(loss)) for step, loss in enumerate(losses, start=1)]
    return [line for line in notes if line]


def noisy(level: np.ndarray) -> np.ndarray:
    return level + np.random.default_rng(0).normal(0, 0.1, len(level))


def test_a_stuck_loss_is_named_once() -> None:
    (line,) = heard(noisy(np.full(1000, 3.36)))
    assert f"step {30 + WINDOW} " in line and "3.360, the unigram entropy" in line
    assert "model.norm=keel instead of post" in line and "schedule.warmup_steps=30" in line
    assert "optim.lr=0.003" in line
    assert "model.norm" not in heard(noisy(np.full(1000, 3.36)), norm="keel")[0]


@pytest.mark.parametrize(
    "level",
    [
        np.full(1000, 3.36 + 3 * NEAR),
        np.full(1000, 3.36 - 3 * NEAR),
        # 一路降过这一水平：四段的平均不会都在近旁。
        np.linspace(4.4, 1.4, 1000),
        # 上下对称地摆：总平均在，各段不在。
        3.36 + 0.5 * np.sin(np.arange(1000) / 30),
    ],
)
def test_learning_is_left_in_peace(level: np.ndarray) -> None:
    assert heard(noisy(level)) == []


def test_warm_up_does_not_count() -> None:
    assert heard(np.full(30 + WINDOW - 1, 3.36)) == []
    assert len(heard(np.full(30 + WINDOW, 3.36))) == 1


def test_training_says_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """词语随机的数据本来学得动；学习率小到学不动、熵又设成此刻的损失，就该提醒。"""
    monkeypatch.setattr(plateau, "_BLOCK_STEPS", 5)
    monkeypatch.setattr(plateau, "WINDOW", 20)
    monkeypatch.setattr(plateau, "NEAR", 0.5)
    from app.training import trainer as trainer_module

    told: list[str] = []
    monkeypatch.setattr("app.training.opened.unigram_entropy", lambda data: 3.5)
    monkeypatch.setattr(trainer_module.Progress, "tell", lambda self, text: told.append(text))
    train(make(steps=40, optim=OptimConfig(lr=1e-9)))
    assert len([line for line in told if "unigram entropy" in line]) == 1


def test_reads_a_real_dataset(dataset: Path) -> None:
    data = TokenDataset.open(dataset / "train")
    assert 2.0 < unigram_entropy(data) < np.log(data.vocab_size)

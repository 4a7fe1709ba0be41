"""每步与总共的词元数：远低于常理才说，说出两个数。"""

from __future__ import annotations

from pathlib import Path

from app.models.transformer import GPT2Config
from app.training import run as run_module
from app.training.config import TrainConfig
from app.training.watch.guidance import token_notes

from ..conftest import Make

SMALL = 124_439_808


def run(batch: int, steps: int = 5000) -> TrainConfig:
    return TrainConfig(model=GPT2Config(norm="pre"), batch_size=batch, steps=steps)


def test_far_under_gpt3() -> None:
    (step,) = [n for n in token_notes(run(32), SMALL, None) if n.startswith("warning")]
    assert "32,768 tokens a step" in step and "500,000 of GPT-3" in step
    assert not any(n.startswith("warning") for n in token_notes(run(512), SMALL, None))
    assert not any(n.startswith("warning") for n in token_notes(run(64), SMALL, None))


def test_larger_models_want_more() -> None:
    (step,) = [n for n in token_notes(run(32), 7_000_000_000, None) if n.startswith("warning")]
    assert "2,000,000 of GPT-3" in step


def test_a_small_model_is_compared_with_its_run_file_only() -> None:
    assert not any("a step" in n for n in token_notes(run(1), 1_000_000, None))
    (step,) = [n for n in token_notes(run(1), 1_000_000, run(8)) if "a step" in n]
    assert "1,024 tokens a step" in step and "8,192 of the run file" in step
    assert not any("a step" in n for n in token_notes(run(2), 1_000_000, run(8)))


def test_training_says_it_too(make: Make) -> None:
    """开训时就说，报告里也有。"""
    told: list[str] = []
    config = make(batch_size=1, micro_batch=None)
    run_module.train(config, lambda plan: None, told.append, preset=make(batch_size=8))
    (line,) = [text for text in told if "tokens a step" in text]
    assert "8 tokens a step, far under the 64 of the run file" in line
    assert "far under the 64" in (Path(config.out) / "report.html").read_text()


def test_tokens_per_parameter_is_a_note() -> None:
    notes = token_notes(run(512, steps=100 * 10), SMALL * 10, None)
    assert any(n.startswith("note: 0.42 tokens per parameter") for n in notes)
    assert token_notes(run(512, steps=19_000), SMALL, None) == []

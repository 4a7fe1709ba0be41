"""样文的提示：只在真要写样文时才查；默认的提示适合任何字符表。"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from app.cli.commands import train as command
from app.data.prepare import TokenizerSpec, prepare
from app.data.reading.sources import Sources
from app.training.config import DataConfig, TrainConfig
from app.training.sweep import check

from ..conftest import Make, rows, train


@pytest.fixture
def dna(tmp_path: Path) -> DataConfig:
    """只有四个字母、没有换行的数据。"""
    source, text = random.Random(0), tmp_path / "dna.txt"
    text.write_text("".join(source.choice("ACGT") for _ in range(5000)))
    folder = tmp_path / "dna"
    prepare(Sources((text,)), folder, TokenizerSpec("chars"), say=lambda line: None)
    return DataConfig(folder=str(folder))


def test_an_alphabet_without_a_line_break_trains(make: Make, dna: DataConfig) -> None:
    """默认的提示：没有换行就从文档的开头写起。"""
    config = make(data=dna, sample_tokens=5)
    check(config)
    assert train(config).step == 6
    text = rows(config.out, "sample")[0]["text"]
    assert set(text.removeprefix("<|endoftext|>")) <= set("ACGT")


def test_a_prompt_nobody_uses_is_not_checked(make: Make, dna: DataConfig) -> None:
    config = make(data=dna, sample_tokens=0, sample_prompt="def ")
    check(config)
    assert train(config).step == 6


def test_a_prompt_that_is_used_is_refused_by_name(make: Make, dna: DataConfig) -> None:
    config = make(data=dna, sample_tokens=5, sample_prompt="def ")
    for refused in (train, check):
        with pytest.raises(ValueError, match=r"sample_prompt='def ' cannot be encoded: .*--sample"):
            refused(config)
    assert not Path(config.out).exists()


def test_the_prompt_of_a_recipe_gives_way_to_the_data(
    make: Make, dna: DataConfig, tmp_path: Path
) -> None:
    """quickstart 的提示是一段 Python：那不是用户要的，数据里没有就换成默认的，说一句。"""
    from app.training import run as run_module

    recipe: TrainConfig = make(data=dna, sample_tokens=5, sample_prompt="def ")
    told: list[str] = []
    run_module.train(recipe, lambda plan: None, told.append, preset=recipe)
    assert any(
        line.startswith("note: sample_prompt='def ' of the run file cannot be encoded") for line
        in told
    )  # fmt: skip
    assert set(rows(recipe.out, "sample")[0]["text"].removeprefix("<|endoftext|>")) <= set("ACGT")
    with pytest.raises(ValueError, match="sample_prompt='xyz' cannot be encoded"):
        run_module.train(
            recipe.replace(out=str(tmp_path / "b"), sample_prompt="xyz"), lambda plan: None,
            told.append, preset=recipe,
        )  # fmt: skip


def test_quickstart_takes_any_alphabet(dna: DataConfig, tmp_path: Path) -> None:
    done = command.run(
        command.parse(
            f"--config quickstart --data.folder {dna.folder} --out {tmp_path / 'run'} --steps 2 "
            "--schedule.warmup-steps 0 --model.n-layer 1 --model.n-embed 16 --batch-size 2 "
            "--sample-tokens 4 --compile off --eval-batches 1".split()
        )
    )
    assert done == 0 and rows(tmp_path / "run", "sample")

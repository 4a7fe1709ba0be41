"""最好的那个数与它在什么上量的：换了尺子就重量，绝不拿不同的尺子量出的数相比。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.data.shards import TokenDataset
from app.models.transformer import GPT2Model
from app.training.config import DataConfig
from app.training.machine.runtime import choose_runtime
from app.training.report.compare_runs import load_run
from app.training.saving.checkpoint import BEST, best_measured, read_best, step_folder
from app.training.watch.validation import Spread, Validation

from ..conftest import Make, rows, same_weights, train, write_dataset


def measured(config: Any) -> dict[str, Any]:
    data = TokenDataset.open(Path(config.data.folder) / "val")
    windows = config.eval_batches * config.batch_size
    return Spread(data, config.model.context_size, windows, 1).measured


def loss_of(config: Any, step: int) -> float:
    """那个检查点在 config 的验证窗口上的损失，另算一遍。"""
    model = GPT2Model.from_pretrained(step_folder(Path(config.out), step))
    data = TokenDataset.open(Path(config.data.folder) / "val")
    windows = config.eval_batches * config.batch_size
    rows = config.micro_batch or config.batch_size
    validation = Validation(Spread(data, config.model.context_size, windows, rows))
    loss = validation.loss(model, choose_runtime(config))
    assert loss is not None
    return loss


def test_the_record_says_what_it_was_measured_on(make: Make) -> None:
    config = make(eval_every=2)
    train(config)
    assert best_measured(Path(config.out)) == measured(config)
    assert measured(config)["windows"] == 4 and measured(config)["context"] == 8
    assert all(row["measured"] == measured(config) for row in rows(config.out, "eval"))


@pytest.mark.parametrize("change", [{"eval_batches": 5}, {"batch_size": 8}, {"eval_batches": 0}])
def test_another_ruler_measures_again(make: Make, change: dict[str, Any]) -> None:
    """假装旧尺子量得极低（否则再也没有更好的）：重量之后，新的最好的照样立得起来。"""
    config, told = make(eval_every=2, save_every=2, keep_last=9), []
    train(config)
    run = Path(config.out)
    found = read_best(run)
    assert found is not None
    record = json.loads((run / BEST).read_text())
    (run / BEST).write_text(json.dumps(record | {"loss": 0.001}))
    changed = config.replace(**change, resume="auto", steps=30)
    anew = loss_of(changed, found[0])
    result = train(changed, told)
    again = [line for line in told if line.startswith(f"best checkpoint (step {found[0]})")]
    assert len(again) == 1 and "was 0.0010 on 4 windows of 8 tokens" in again[0]
    assert f"{anew:.4f} (was" in again[0]
    assert result.best is not None and result.best[0] > found[0] and result.best[1] > 0.1
    assert best_measured(run) == measured(changed) != measured(config)


def test_measuring_again_changes_no_bit(make: Make, tmp_path: Path) -> None:
    config = make(eval_every=2, save_every=3, keep_last=9, steps=6)
    train(config)
    whole = train(make(out=str(tmp_path / "whole"), eval_every=2, steps=10))
    result = train(config.replace(eval_batches=3, resume="auto", steps=10))
    plain = train(make(out=str(tmp_path / "plain"), eval_every=2, steps=10, eval_batches=3,
                       resume=str(step_folder(Path(config.out), 6))))  # fmt: skip
    assert same_weights(result.checkpoint, plain.checkpoint)
    # 学习率随总步数变，所以与一口气的 10 步不同：这里只要求两条路相同。
    assert not same_weights(whole.checkpoint, plain.checkpoint)


def test_the_same_ruler_is_left_alone(make: Make) -> None:
    config, told = make(eval_every=2, save_every=2), []
    train(config)
    before = (Path(config.out) / BEST).read_bytes()
    # 批大小减半、批数加倍：还是那些窗口。
    train(config.replace(batch_size=2, eval_batches=2, resume="auto"), told)
    assert not [line for line in told if "measured again" in line]
    assert (Path(config.out) / BEST).read_bytes() == before


def test_a_record_from_before_it_was_kept_is_measured_again(make: Make) -> None:
    config, told = make(eval_every=2, save_every=2), []
    train(config)
    path = Path(config.out) / BEST
    record = json.loads(path.read_text())
    path.write_text(json.dumps({"step": record["step"], "loss": record["loss"]}))
    train(config.replace(resume="auto"), told)
    line = next(line for line in told if "measured again" in line)
    assert f"{record['loss']:.4f} (was {record['loss']:.4f} on unknown windows" in line
    assert json.loads(path.read_text()) == record


def test_another_validation_part_measures_again(make: Make, tmp_path: Path) -> None:
    """同一个训练集，换了 val/：数不可比，重量。"""
    folder = write_dataset(tmp_path / "words")
    config, told = make(data=DataConfig(folder=str(folder)), eval_every=2, save_every=2), []
    train(config)
    best = read_best(Path(config.out))
    other = write_dataset(tmp_path / "other", seed=4)
    (folder / "val").rename(tmp_path / "old val")
    (other / "val").rename(folder / "val")
    train(config.replace(resume="auto", steps=7), told)
    line = next(line for line in told if "measured again" in line)
    assert best is not None and f"{loss_of(config, best[0]):.4f} (was {best[1]:.4f}" in line


def test_a_validation_part_of_another_tokenizer_is_refused(make: Make, tmp_path: Path) -> None:
    from app.data.prepare import TokenizerSpec, prepare
    from app.data.reading.sources import Sources

    folder = write_dataset(tmp_path / "words")
    prepare(
        Sources((folder.with_suffix(".txt"),)), tmp_path / "bytes", TokenizerSpec("bytes"),
        say=lambda line: None,
    )  # fmt: skip
    (folder / "val").rename(tmp_path / "old val")
    (tmp_path / "bytes" / "val").rename(folder / "val")
    config = make(data=DataConfig(folder=str(folder)))
    with pytest.raises(ValueError, match=r"val was written with the tokenizer .* but .*train with"):
        train(config)
    assert not Path(config.out).exists()


def test_only_like_numbers_are_compared_in_the_reports(make: Make) -> None:
    config = make(eval_every=2)
    train(config)
    path = Path(config.out) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(row for row in lines if row["kind"] == "eval" and row["step"] == 2)
    first |= {"loss": 0.001, "measured": first["measured"] | {"windows": 1}}
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert load_run(Path(config.out)).val.min() > 0.1
    from app.training.report.run_page import write_report

    page = write_report(Path(config.out)).read_text()
    assert "best validation loss" in page and "best validation loss 0.0010" not in page

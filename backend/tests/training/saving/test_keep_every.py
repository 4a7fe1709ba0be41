"""--keep-every：那些步的检查点一直留着，权重不因此变一位，续训也一样；没有它的运行文件照旧。"""

from __future__ import annotations

from pathlib import Path

import pytest

from app.training.config import TrainConfig
from app.training.saving.checkpoint import list_steps, read_best, step_folder
from app.training.watch.validation import Validation
from tests.training.conftest import Make, same_weights, train


def held(out: Path | str) -> list[int]:
    return [step for step, _ in list_steps(Path(out))]


def test_kept_besides_the_newest_and_the_best(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(out=str(tmp_path / "kept"), steps=11, keep_every=3, keep_last=1, save_every=2)
    train(config)
    assert held(config.out) == [3, 6, 9, 11]
    both = config.replace(out=str(tmp_path / "both"), eval_every=4)
    # 最好的在第 4 步：既不是最新的，也不是每三步的。
    losses = iter([5.0, 1.0, 2.0, 3.0])
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "loss", lambda *given: next(losses))
        train(both)
    assert read_best(Path(both.out)) == (4, 1.0) and held(both.out) == [3, 4, 6, 9, 11]
    plain = config.replace(out=str(tmp_path / "plain"), keep_every=0, save_every=0)
    train(plain)
    assert held(plain.out) == [11]
    assert same_weights(step_folder(tmp_path / "kept", 11), step_folder(tmp_path / "plain", 11))


def test_resuming_is_exact_and_keeps_what_was_kept(make: Make, tmp_path: Path) -> None:
    whole = make(out=str(tmp_path / "whole"), steps=10, keep_every=4, keep_last=1)
    train(whole)
    # 从留下的那一步接着训，与不停的逐位相同。
    source = step_folder(tmp_path / "whole", 4)
    again = whole.replace(out=str(tmp_path / "again"), resume=str(source))
    train(again)
    assert held(again.out) == [8, 10]
    for step in (8, 10):
        assert same_weights(step_folder(tmp_path / "again", step), step_folder(source.parent, step))
    # 训完之后再延长，先前留下的都还在。
    train(whole.replace(resume="auto", steps=13))
    assert held(whole.out) == [4, 8, 12, 13]


def test_going_on_past_a_damaged_checkpoint_keeps_the_good_ones(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """最新的第 8 步坏了，从第 4 步续；第 5 步更好，被叫停：它在，best 也指着它。"""
    config = make(out=str(tmp_path / "run"), steps=8, keep_last=2, save_every=4)
    train(config)
    (step_folder(tmp_path / "run", 8) / "model.safetensors").write_bytes(b"damaged")
    losses = iter([3.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(Validation, "loss", lambda *given: next(losses))
    changes = {"resume": "auto", "keep_last": 1, "eval_every": 1, "save_every": 0, "steps": 7}
    train(config.replace(**changes))
    assert read_best(tmp_path / "run") == (5, 1.0) and held(config.out) == [5, 7, 8]


@pytest.mark.parametrize("later", [0, 6])
def test_changing_it_loses_nothing_that_was_kept(later: int, make: Make, tmp_path: Path) -> None:
    """每个检查点自己记着存下时的 keep_every：当时说好留着的，后来改大、关掉都还在。"""
    config = make(out=str(tmp_path / "run"), steps=8, keep_every=4, keep_last=1)
    train(config)
    train(config.replace(resume="auto", steps=13, keep_every=later))
    assert held(config.out) == ([4, 8, 12, 13] if later else [4, 8, 13])
    # 隔了一次续训也一样：记的是它自己的，不是上一次的。
    train(config.replace(resume="auto", steps=14, keep_every=0))
    assert held(config.out) == ([4, 8, 12, 14] if later else [4, 8, 14])


def test_a_run_file_without_it_keeps_its_meaning() -> None:
    old = TrainConfig().to_dict()
    del old["keep_every"]
    config = TrainConfig.from_dict(old)
    assert config.keep_every == 0 and config == TrainConfig()
    assert [s for s in range(1, 1001) if config.saves_at(s)] == [500, 1000]
    with pytest.raises(ValueError, match="keep_every=-1 must be at least 0"):
        TrainConfig(keep_every=-1)

"""续训：逐位相等；缺任何一份状态都会被发现；配置变了，能拒的拒，能提醒的提醒。"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.sampler import Sampler
from app.models.transformer import GPT2Model
from app.training import run as run_module
from app.training.config import DataConfig, OptimConfig, ScheduleConfig
from app.training.saving import state as state_module
from app.training.saving.checkpoint import CheckpointError, list_steps, step_folder
from app.training.saving.resume import check_compatible
from app.training.watch import ending as ending_module

from ..conftest import Make, rows, same_weights, train, write_dataset

STEPS = 24


@pytest.fixture
def augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    """批里掺进 numpy 与 python 两家的随机数，像用户的随机增广那样。"""
    plain = Sampler.batch

    def batch(self: Sampler, data: Any, step: int, part: slice = slice(None)) -> Any:
        inputs, targets = plain(self, data, step, part)
        inputs[0, np.random.randint(inputs.shape[1])] = 0
        inputs[-1, random.randrange(inputs.shape[1])] = 1
        return inputs, targets

    monkeypatch.setattr(Sampler, "batch", batch)


@pytest.fixture
def straight(make: Make, tmp_path: Path, augmented: None) -> Path:
    """不间断的一次，每步都存。"""
    out = tmp_path / "straight"
    train(make(out=str(out), steps=STEPS, save_every=1, keep_last=100, eval_every=5))
    return out


def resumed(make: Make, straight: Path, step: int, out: Path) -> tuple[bool, bool]:
    """从 step 接着训到底：(权重相等, 其后每步的损失相等)。"""
    source = step_folder(straight, step)
    train(make(out=str(out), steps=STEPS, resume=str(source), eval_every=5))
    after = [row["loss"] for row in rows(out)]
    wanted = [row["loss"] for row in rows(straight) if row["step"] > step]
    equal = same_weights(step_folder(out, STEPS), step_folder(straight, STEPS))
    return equal, after == wanted


def test_exact_at_every_step(make: Make, straight: Path, tmp_path: Path) -> None:
    """A7：24 步，dropout、两个微批、预热、裁剪、随机增广；23 处续训逐位相等。"""
    assert len(list_steps(straight)) == STEPS
    for step in range(1, STEPS):
        assert resumed(make, straight, step, tmp_path / f"from-{step}") == (True, True), step


def test_exact_with_muon(make: Make, tmp_path: Path, augmented: None) -> None:
    """两种更新、两个学习率、wsd：从预热中、平稳段与下降段接着训，逐位相等。"""
    plan = {
        "steps": STEPS,
        "optim": OptimConfig(name="muon", lr=1e-2, muon_lr=2e-2, grad_clip=0.5),
        "schedule": ScheduleConfig(kind="wsd", warmup_steps=4, decay_fraction=0.3),
    }
    out = tmp_path / "straight"
    train(make(out=str(out), save_every=1, keep_last=100, **plan))
    for step in (2, 11, 20):
        branch = tmp_path / f"from-{step}"
        train(make(out=str(branch), resume=str(step_folder(out, step)), **plan))
        assert same_weights(step_folder(branch, STEPS), step_folder(out, STEPS)), step
        both = [(folder / "optim.safetensors").read_bytes() for folder in (
            step_folder(branch, STEPS), step_folder(out, STEPS)
        )]  # fmt: skip
        assert both[0] == both[1]


def test_another_optimizer_is_refused(make: Make) -> None:
    config = make(save_every=2)
    train(config)
    with pytest.raises(ValueError, match=r"optim.name='muon' but the checkpoint has 'adamw'"):
        train(config.replace(optim=OptimConfig(name="muon"), resume="auto", steps=7))


def _forget_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GPT2Model, "load_state_dict", lambda self, tensors: None)


def _forget_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state_module, "load_optimizer_tensors", lambda *args: None)


def _forget_schedule(patch: pytest.MonkeyPatch) -> None:
    real = ending_module.learning_rate
    patch.setattr(ending_module, "learning_rate", lambda step, **kw: real(step - 10, **kw))


def _forget_sampler(patch: pytest.MonkeyPatch) -> None:
    real = Sampler.offsets
    patch.setattr(Sampler, "offsets", lambda self, step: real(self, max(0, step - 10)))


def _forget_random(reset: Callable[[], object]) -> Callable[[pytest.MonkeyPatch], None]:
    def forget(patch: pytest.MonkeyPatch) -> None:
        real = state_module.set_random_state
        patch.setattr(run_module, "set_random_state", lambda state: (real(state), reset()))

    return forget


MUTATIONS = {
    "model": _forget_model,
    "optimizer": _forget_optimizer,
    "schedule": _forget_schedule,
    "sampler": _forget_sampler,
    "torch": _forget_random(lambda: torch.manual_seed(0)),
    "numpy": _forget_random(lambda: np.random.seed(0)),
    "python": _forget_random(lambda: random.seed(0)),
}


@pytest.mark.parametrize("part", MUTATIONS)
def test_every_part_of_the_state_matters(
    make: Make, straight: Path, tmp_path: Path, part: str
) -> None:
    """A8：漏掉任何一份，上面的试验必须失败。"""
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[part](patch)
        weights_equal, losses_equal = resumed(make, straight, 10, tmp_path / part)
    assert not weights_equal and not losses_equal


def test_auto_falls_back_and_says_so(make: Make, tmp_path: Path) -> None:
    """最新的坏了：退到上一个，说出原因，坏的留证，结果仍与不间断的逐位相等。"""
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    train(make(out=whole, steps=8, save_every=2, eval_every=2, keep_last=9))
    config = make(out=broken, steps=8, save_every=2, eval_every=2, keep_last=9)
    train(config)
    for step in (6, 8):
        (step_folder(Path(broken), step) / "optim.safetensors").write_bytes(b"damaged")
    told: list[str] = []
    train(config.replace(resume="auto"), told)
    skipped = [line for line in told if line.startswith("skipped")]
    assert [line.split()[1] for line in skipped] == ["step-00000008:", "step-00000006:"]
    assert all("optim.safetensors has 7 bytes" in line for line in skipped)
    assert same_weights(step_folder(Path(whole), 8), step_folder(Path(broken), 8))
    for kind in ("train", "eval"):
        keys = ("step", "loss")
        first, second = ([[r[k] for k in keys] for r in rows(o, kind)] for o in (whole, broken))
        assert first == second and len(first) == len({step for step, _ in first})
    assert (Path(broken) / "damaged-step-00000006-1").is_dir()


def test_all_damaged_is_refused(make: Make) -> None:
    config = make(save_every=2)
    train(config)
    for _, folder in list_steps(Path(config.out)):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        train(config.replace(resume="auto"))


def test_existing_folder_is_never_overwritten(make: Make, tmp_path: Path) -> None:
    config = make()
    train(config)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already exists and is never overwritten.*--resume auto"):
        train(config)
    assert before == {p: p.read_bytes() for p in Path(config.out).rglob("*") if p.is_file()}
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    for resume in ("none", "auto"):
        with pytest.raises(ValueError, match=r"thesis"):
            train(make(out=str(foreign), resume=resume))
    assert [entry.name for entry in foreign.iterdir()] == ["chapter.txt"]
    with pytest.raises(ValueError, match="is a file"):
        train(make(out=str(foreign / "chapter.txt")))


def test_auto_starts_when_there_is_nothing(make: Make) -> None:
    told: list[str] = []
    result = train(make(resume="auto"), told)
    assert result.step == 6 and any("nothing to resume" in line for line in told)


def test_longer_run_continues(make: Make) -> None:
    """做完的训练可以加步数；只提醒，不拒绝。"""
    config, told = make(save_every=2), []
    train(config)
    result = train(config.replace(steps=9, resume="auto"), told)
    assert result.step == 9 and [row["step"] for row in rows(config.out)] == list(range(1, 10))
    assert any("steps changed from 6 to 9" in line for line in told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, r"model.n_layer=3 but the checkpoint has 2"),
        ({"n_embed": 32}, r"model.n_embed=32 but the checkpoint has 16"),
        ({"vocab_size": 64}, r"model.vocab_size=64 but the checkpoint has 32"),
        ({"norm": "pre"}, r"model.norm='pre' but the checkpoint has 'post'"),
    ],
)
def test_changed_shapes_are_refused(make: Make, change: dict[str, Any], message: str) -> None:
    """A10"""
    config = make(save_every=2)
    train(config)
    changed = config.replace(model=config.model.replace(**change), resume="auto")
    with pytest.raises(ValueError, match=message):
        train(changed)


def test_other_data_is_refused(make: Make, tmp_path: Path) -> None:
    config = make(save_every=2)
    train(config)
    other = write_dataset(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="resume with the same data"):
        train(config.replace(data=DataConfig(folder=str(other)), resume="auto"))
    # 同样的数据换了地方：照常。
    moved = tmp_path / "moved"
    shutil.copytree(config.data.folder, moved)
    train(config.replace(data=DataConfig(folder=str(moved)), resume="auto", steps=7))


@pytest.mark.parametrize(
    "change", [{"seed": 9}, {"batch_size": 6}, {"optim": OptimConfig(lr=3e-3)}]
)
def test_other_changes_warn(make: Make, change: dict[str, Any]) -> None:
    config, told = make(save_every=2), []
    train(config)
    train(dataclasses.replace(config, **change, resume="auto", steps=7), told)
    name = next(iter(change)) if "optim" not in change else "optim.lr"
    assert any(line.startswith(f"warning: {name} changed from") for line in told)


def test_a_checkpoint_from_before_a_setting_existed(make: Make) -> None:
    """缺的设置按默认值比：旧的检查点照样能续，改了它才被拒。"""
    config, told = make(), []
    saved = config.to_dict()
    del saved["model"]["rope"], saved["model"]["attention_pattern"], saved["keep_last"]
    del saved["optim"]["name"], saved["schedule"]["kind"], saved["spike"]
    check_compatible({"data": "d", "config": saved}, config, "d", told.append)
    assert told == []
    windowed = config.replace(model=config.model.replace(attention_pattern="local(4)"))
    with pytest.raises(ValueError, match=r"attention_pattern='local\(4\)' but .* has None"):
        check_compatible({"data": "d", "config": saved}, windowed, "d", told.append)


def test_threads_and_versions_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, told = make(save_every=2), []
    train(config)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    train(config.replace(resume="auto", steps=7), told)
    assert any("threads was" in line and "now 77" in line for line in told)


def test_exported_model_is_no_training_state(make: Make, tmp_path: Path) -> None:
    config = make()
    GPT2Model(config.model).save_pretrained(tmp_path / "exported")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        train(config.replace(resume=str(tmp_path / "exported")))


def test_earlier_step_of_the_same_run_is_refused(make: Make) -> None:
    config = make(save_every=2)
    train(config)
    earlier = list_steps(Path(config.out))[0][1]
    with pytest.raises(ValueError, match="another --out to branch off"):
        train(config.replace(resume=str(earlier)))

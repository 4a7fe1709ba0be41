"""续训时从哪里读起、学习率是多少：换了批大小也不重不漏，变了的都说出来。"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data.sampler import Sampler
from app.training import trainer as trainer_module
from app.training.config import OptimConfig, ScheduleConfig, TrainConfig
from app.training.optim.schedule import learning_rate
from app.training.saving.checkpoint import MANIFEST, step_folder
from app.training.saving.resume import windows_read

from ..conftest import Make, rows, same_weights, train
from ..test_exactness import sign


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """训练真正读过的窗口的起点，按次序。"""
    found: list[int] = []
    plain = Sampler.batch

    def batch(self: Sampler, data: Any, step: int, part: slice = slice(None)) -> Any:
        found.extend(self.offsets(step)[part].tolist())
        return plain(self, data, step, part)

    monkeypatch.setattr(Sampler, "batch", batch)
    return found


def windows_of(config: TrainConfig) -> Sampler:
    from app.data.shards import TokenDataset

    n_tokens = TokenDataset.open(Path(config.data.folder) / "train").n_tokens
    return Sampler(n_tokens, config.model.context_size, 1, config.seed)


def test_every_window_once_over_changed_batch_sizes(make: Make, read: list[int]) -> None:
    """一遍数据里换三次批大小：每个窗口恰好一次，次序与一口气读完的相同。"""
    config = make(compile="off", micro_batch=None, model=make().model.replace(context_size=256))
    whole = windows_of(config)
    sizes, step, done = [5, 2, 7, 1], 0, 0
    for number, size in enumerate(sizes):
        left = whole.n_windows - done
        more = left if size == 1 else min(left // size, 3)
        step, done = step + more, done + more * size
        told: list[str] = []
        changed = config.replace(batch_size=size, steps=step, resume="auto",
                                 schedule=ScheduleConfig(warmup_steps=1))  # fmt: skip
        train(changed, told)
        assert (number > 0) == any(line.startswith("data goes on at window ") for line in told)
    assert done == whole.n_windows
    assert read == [int(whole.offsets(i)[0]) for i in range(whole.n_windows)]
    assert set(Counter(read).values()) == {1}
    assert (
        json.loads((step_folder(Path(config.out), step) / "state.json").read_text())["windows"]
        == done
    )


def test_where_it_goes_on_is_said(make: Make) -> None:
    config, told = make(steps=6), []
    train(config)
    total = windows_of(config).n_windows
    train(config.replace(steps=7, batch_size=2, resume="auto"), told)
    line = f"data goes on at window 25 of {total:,} in pass 1 (24 windows of 8 tokens were read)"
    assert line in told
    assert rows(config.out)[-1]["tokens"] == (24 + 2) * 8


def test_the_plan_counts_what_was_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.training import run as run_module

    config = make(steps=6)
    train(config)
    plans: list[Any] = []
    changed = config.replace(steps=10, batch_size=2, resume="auto")
    run_module.train(changed, plans.append, lambda text: None)
    why = next(why for name, _, why in plans[0] if name == "run")
    assert why.startswith(f"{(6 * 4 + 4 * 2) * 8:,} tokens, ")


def forget(folder: Path, *keys: str) -> None:
    """把检查点变成没有这几项的早先的样子。"""
    path = folder / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in state.items() if k not in keys}))
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = [{"name": "state.json"} | manifest["files"]["state.json"]]
    (folder / "meta.json").write_text(json.dumps({"files": entry}))
    sign(folder)
    signed = json.loads((folder / "meta.json").read_text())["files"][0]
    manifest["files"]["state.json"] = {k: signed[k] for k in ("bytes", "sha256")}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "meta.json").unlink()


@pytest.mark.parametrize("batch_size", [4, 2])
def test_checkpoints_from_before_it_was_kept(
    make: Make, tmp_path: Path, read: list[int], batch_size: int
) -> None:
    """没有这一项的检查点：同样的批大小逐位相等；换了批大小也从读到的地方接着读。"""
    config = make(steps=6, save_every=3, keep_last=9, compile="off")
    straight = train(config)
    old = step_folder(Path(config.out), 3)
    forget(old, "windows", "patience")
    read.clear()
    branch = config.replace(
        out=str(tmp_path / "branch"), resume=str(old), batch_size=batch_size, micro_batch=None
        if batch_size == 2 else 2,
    )  # fmt: skip
    result = train(branch)
    first = windows_of(config)
    wanted = [int(first.offsets(i)[0]) for i in range(12, 12 + 3 * batch_size)]
    assert read == wanted
    assert same_weights(straight.checkpoint, result.checkpoint) == (batch_size == 4)


def test_another_seed_is_another_order(make: Make) -> None:
    config, told = make(steps=6), []
    train(config)
    train(config.replace(seed=3, steps=7, resume="auto"), told)
    assert any(
        line.startswith("warning: seed 3 draws the windows in another order than seed 0") for line
        in told
    )  # fmt: skip


def test_windows_of_an_old_state() -> None:
    assert windows_read({"step": 5, "config": {"batch_size": 3}}) == 15
    assert windows_read({"step": 5, "config": {"batch_size": 3}, "windows": 4}) == 4


# ---- 学习率 ----

JUMPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more steps": ({}, {"steps": 60}),
    "another peak": ({}, {"optim": OptimConfig(lr=3e-3, grad_clip=0.5), "steps": 20}),
    "another kind": ({}, {"schedule": ScheduleConfig(kind="linear", warmup_steps=4), "steps": 20}),
    "another end": ({}, {"schedule": ScheduleConfig(warmup_steps=4, min_lr_ratio=0.5),
                         "steps": 20}),
    "longer warm-up": ({}, {"schedule": ScheduleConfig(warmup_steps=12), "steps": 20}),
}  # fmt: skip


@pytest.mark.parametrize("name", JUMPS)
def test_a_jump_of_the_learning_rate_is_said(make: Make, name: str) -> None:
    """两个学习率都说出来，正是那一步真用的与本来要用的。"""
    before, after = JUMPS[name]
    config, told = make(steps=12, **before), []
    train(config)
    changed = config.replace(**after, resume="auto")
    train(changed, told)
    used = rows(config.out)[12]["lr"]
    due = learning_rate(12, peak=config.optim.lr, steps=12, schedule=config.schedule)
    assert used != due
    lines = [line for line in told if "learning rate" in line]
    assert lines == [
        f"warning: the learning rate of the next step (step 13) is {used:.3g}; with the settings "
        f"of the checkpoint it was to be {due:.3g}"
    ]


def test_no_jump_says_nothing(make: Make) -> None:
    config, told = make(steps=12, save_every=6, keep_last=9), []
    train(config)
    train(config.replace(out=config.out + "2", eval_every=3,
                         resume=str(step_folder(Path(config.out), 6))), told)  # fmt: skip
    assert not [line for line in told if "learning rate" in line]


def test_both_rates_of_muon_are_said(make: Make) -> None:
    config = make(steps=12, optim=OptimConfig(name="muon", lr=1e-2, muon_lr=2e-2))
    told: list[str] = []
    train(config)
    train(config.replace(steps=40, resume="auto"), told)
    lines = [line for line in told if "learning rate" in line]
    assert [re.findall(r"learning rate( of muon)?", line) for line in lines] == [[""], [" of muon"]]


def test_the_trial_of_the_compiler_reads_a_batch_that_exists(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """批变大之后第 0 批在读过的窗口之前：试跑用的是下一批。"""
    config = make(steps=6)
    train(config)
    seen: list[np.ndarray] = []

    def compile_blocks(blocks: Any, choice: str, device: Any, probe: Any, *rest: Any) -> str:
        probe()
        return "off: tried"

    monkeypatch.setattr(trainer_module, "compile_blocks", compile_blocks)
    plain = Sampler.offsets
    monkeypatch.setattr(
        Sampler, "offsets", lambda self, step: seen.append(plain(self, step)) or seen[-1]
    )
    train(config.replace(batch_size=8, steps=7, resume="auto"))
    assert np.array_equal(seen[0], seen[1])

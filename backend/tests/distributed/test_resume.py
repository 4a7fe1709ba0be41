"""P12：2 -> 4 -> 1 个 rank 接着训，与不间断的逐位相同；从没有 rank 的来、到没有 rank 的去。"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.distributed.comm import Ranks
from app.training import run as run_module
from app.training import trainer as trainer_module
from app.training.config import OptimConfig, TrainConfig
from app.training.saving import checkpoint as checkpoint_module
from app.training.saving.checkpoint import find_latest, list_steps

from ..training.conftest import Make, rows, same_weights
from .ranks import run_ranks
from .team import failing_here, fingerprint, train_here, train_on

STEPS = 6
CHANGES: dict[str, Any] = {
    "steps": STEPS, "batch_size": 8, "micro_batch": 1, "eval_every": 2, "eval_batches": 2,
    "save_every": 2, "keep_last": 9,
}  # fmt: skip


def _stopping_at(step: int) -> Callable[[], None]:
    """做完第 step 步时 rank 0 收到 SIGTERM。"""

    def prepare() -> None:
        real = trainer_module.Trainer._train_step

        def train_step(self: Any) -> None:
            real(self)
            if self.step == step and Ranks.world().rank == Ranks.world().size - 1:
                os.kill(os.getpid(), 15)

        trainer_module.Trainer._train_step = train_step  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize("optim", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_2_then_4_then_1_rank_is_the_undisturbed_run(
    make: Make,
    tmp_path: Path,
    optim: str,
) -> None:
    changes = CHANGES | {"optim": OptimConfig(name=optim, lr=1e-2, grad_clip=0.5)}  # type: ignore
    whole = make(out=str(tmp_path / "whole"), **changes)
    wanted = fingerprint(train_on(2, whole)[0])
    parts = make(out=str(tmp_path / "parts"), **changes)
    at = Path(train_on(2, parts, _stopping_at(1))[0]).name
    assert at == "step-00000002"
    again = parts.replace(resume="auto")
    assert Path(train_on(4, again, _stopping_at(3))[0]).name == "step-00000004"
    last, said = train_on(1, again)
    assert fingerprint(last) == wanted and last.name == "step-00000006"
    assert not any(line.startswith("warning") for line in said), said
    for kind in ("train", "eval"):
        seen = [[(r["step"], r["loss"]) for r in rows(run, kind)] for run in (whole.out, parts.out)]
        assert seen[0] == seen[1]
    # 摘要也一样，除了随机数与几个 rank 这两样。
    files = [
        json.loads((p / "manifest.json").read_text())["files"] for p in (last, whole_of(whole))
    ]
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"]


def whole_of(config: TrainConfig) -> Path:
    found = find_latest(Path(config.out))[0]
    assert found is not None
    return found


def _without_ranks(config: TrainConfig) -> tuple[str, list[str]]:
    lines: list[str] = []
    run_module.plot_losses = lambda run: None  # type: ignore[assignment]
    done = run_module.train(config, lambda plan: None, lines.append)
    return str(done.checkpoint), lines


def test_without_ranks_an_exact_run_goes_on_with_the_same_bits(
    make: Make,
    tmp_path: Path,
) -> None:
    whole = make(out=str(tmp_path / "whole"), **CHANGES)
    wanted = fingerprint(train_on(2, whole)[0])
    config = make(out=str(tmp_path / "parts"), **CHANGES)
    train_on(2, config, _stopping_at(3))
    ((last, said),) = run_ranks(1, _without_ranks, config.replace(resume="auto"))
    assert fingerprint(Path(last)) == wanted
    assert any("trained by 2 ranks in exact mode: going on with one" in line for line in said)
    assert not any(line.startswith("warning") for line in said), said


def test_a_plain_run_under_ranks_says_what_changes(make: Make) -> None:
    config = make(**CHANGES)
    run_ranks(1, _without_ranks, config)
    said = train_on(2, config.replace(steps=8, resume="auto"))[1]
    assert any("summed in one process without ranks, now in a fixed tree" in s for s in said)


def test_micro_batches_are_settled_so_that_ranks_share_the_leaves(
    make: Make,
    tmp_path: Path,
) -> None:
    found = []
    for size in (1, 2, 4):
        config = make(out=str(tmp_path / str(size)), **(CHANGES | {"micro_batch": None}))
        found.append(fingerprint(train_on(size, config)[0]))
        assert "micro_batch: 2" in (Path(config.out) / "run.yaml").read_text()
    assert len(set(found)) == 1


# ---- P13 ----


def _failing_write(at: int) -> Callable[[], None]:
    """rank 0 在第 at 次落盘时盘满。"""

    def prepare() -> None:
        real, calls = checkpoint_module._sync_file, [0]

        def sync(path: Path) -> None:
            calls[0] += 1
            if calls[0] == at:
                raise OSError(28, "No space left on device", str(path))
            real(path)

        checkpoint_module._sync_file = sync  # type: ignore[assignment]

    return prepare


def _full_disk() -> None:
    def write(*args: Any) -> Path:
        raise OSError(28, "No space left on device")

    trainer_module.write_checkpoint = write  # type: ignore[assignment]


def test_a_full_disk_ends_every_rank_with_the_same_error(make: Make) -> None:
    found = run_ranks(2, failing_here, make(**CHANGES), _full_disk)
    assert [kind for kind, _ in found] == ["OSError"] * 2 and found[0][1] == found[1][1]
    assert "No space left on device; last good one: none yet" in found[0][1]


@pytest.mark.parametrize(
    "at", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 11))]
)
def test_a_save_that_fails_once_is_a_warning(make: Make, tmp_path: Path, at: int) -> None:
    config = make(**CHANGES)
    found = run_ranks(2, train_here, config, _failing_write(at))
    assert [result["step"] for result, _ in found] == [STEPS] * 2
    steps = [step for step, _ in list_steps(Path(config.out))]
    assert steps[-1] == STEPS and len(steps) in (2, 3)
    quiet = make(out=str(tmp_path / "quiet"), **CHANGES)
    assert same_weights(whole_of(config), train_on(2, quiet)[0])

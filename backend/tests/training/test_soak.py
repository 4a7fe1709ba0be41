"""久训（C9）：验证、保存、样文、报告与事件都开着，内存与打开的文件不涨。"""

from __future__ import annotations

from pathlib import Path

import pytest

from app.training.saving.checkpoint import list_steps

from .child import answer, run_child
from .conftest import Make, rows
from .report.test_tensorboard import installed

WATCHED = """
from app.training import trainer as trainer_module
plain, seen = trainer_module.Trainer._train_step, []
def step(self):
    plain(self)
    if self.step % max(1, config.steps // 40) == 0:
        lines = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
        seen.append((self.step, used, len(os.listdir("/proc/self/fd"))))
trainer_module.Trainer._train_step = step
train(config)
print(json.dumps(seen))
"""


@pytest.mark.slow
@installed
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("steps", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_and_files_do_not_grow(make: Make, tmp_path: Path, steps: int) -> None:
    """头四分之一是预热；其后增加不到 20 MB，文件数不变。"""
    config = make(
        steps=steps, eval_every=10, save_every=10, sample_every=20, sample_tokens=8,
        tensorboard=True,
    )  # fmt: skip
    seen = answer(run_child(WATCHED, config, tmp_path))
    assert len(seen) == 40 and seen[-1][0] == steps
    warm = seen[10:]
    assert max(used for _, used, _ in warm) - warm[0][1] < 20e6
    files = [count for _, _, count in warm]
    # 事件由另一个线程写，每次打开文件再关上：偶尔多数到一个。
    assert min(files[-10:]) == min(files[:10]) and max(files) <= min(files) + 1
    run = Path(config.out)
    assert len(rows(run)) == steps and len(rows(run, "eval")) == steps // 10 + 1
    assert len(list_steps(run)) <= config.keep_last + 1

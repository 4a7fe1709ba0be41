"""在另一个进程里做会毁掉进程或机器的事：把盘写满、限住内存、发信号。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.training.config import TrainConfig

BACKEND = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BACKEND)}
# 代码里可用：config、folder（第二个参数）、train。
_START = """
import json, os, sys
from pathlib import Path
from app.training import run as run_module
from app.training.config import TrainConfig
config, folder = TrainConfig.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
def train(config, tell=lambda text: None):
    return run_module.train(config, lambda plan: None, tell)
"""


def arguments(code: str, config: TrainConfig, folder: Path) -> list[str]:
    given = json.dumps(config.to_dict())
    return [sys.executable, "-c", _START + code, given, str(folder)]


def run_child(
    code: str, config: TrainConfig, folder: Path, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *arguments(code, config, folder)],
        cwd=BACKEND, env=ENV, capture_output=True, text=True,
    )  # fmt: skip


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """子进程最后打印的一行 JSON。"""
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])

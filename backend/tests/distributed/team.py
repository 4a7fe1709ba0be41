"""一次完整的训练在几个 rank 上：配置与单进程的训练试验相同，只是小而快。"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# 一建优化器就要载入它（几秒）：fork 之前载入，子进程不必各来一次。
import torch._dynamo  # noqa: F401

from app.distributed.mesh import Mesh, build_mesh
from app.training import run as run_module
from app.training.config import TrainConfig

from .ranks import run_ranks

Prepare = Callable[[], object]


def mesh_of(config: TrainConfig) -> Mesh:
    return build_mesh(config.parallel, "cpu")


def train_here(config: TrainConfig, prepare: Prepare | None = None) -> tuple[dict[str, Any], list]:
    """在这个 rank 上训练；(几个结果, 说过的话)。"""
    if prepare is not None:
        prepare()
    lines: list[str] = []
    run_module.plot_losses = lambda run: None  # type: ignore[assignment]
    found = run_module.train(config, lambda plan: None, lines.append, mesh=mesh_of(config))
    result = {"step": found.step, "skipped": found.skipped, "stopped": found.stopped}
    return result | {"checkpoint": str(found.checkpoint)}, lines


def failing_here(config: TrainConfig, prepare: Prepare | None = None) -> tuple[str, str]:
    """(错误的类, 它的话)。"""
    try:
        train_here(config, prepare)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def train_on(size: int, config: TrainConfig, *more: Any) -> tuple[Path, list[str]]:
    """(检查点, rank 0 说过的话)。"""
    if size == 1:
        # 同样在子进程里：线程数与种子相同。
        (found,) = run_ranks(1, train_here, config, *more)
    else:
        found = run_ranks(size, train_here, config, *more)[0]
    return Path(found[0]["checkpoint"]), found[1]


def fingerprint(checkpoint: Path) -> str:
    """权重（或适配器）与优化器的字节。"""
    digest, found = hashlib.sha256(), sorted(checkpoint.glob("*.safetensors"))
    assert len(found) == 2, found
    for path in found:
        digest.update(path.read_bytes())
    return digest.hexdigest()

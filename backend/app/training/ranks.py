"""一次训练怎样分到几个 rank 上：微批定多大，各 rank 是否跑着同一件事，续训时什么会变。"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from app.common.tell import Tell
from app.distributed.check import Job, stages_of

from .config import TrainConfig, flat
from .saving.state import versions

# 没有写明微批时按这么多个 rank 切：1、2、4 个 rank 于是有同样的叶子、同样的位。
LEAVES = 4
_TREE = "tree"


def job_of(config: TrainConfig) -> Job:
    return Job(
        parallel=config.parallel,
        model=config.model,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        sample_tokens=config.sample_tokens,
        compile=config.compile,
        device=config.device,
        optimizer=config.optim.name,
        objective=config.objective.kind,
    )


def with_leaves(config: TrainConfig, data_ranks: int) -> TrainConfig:
    """微批定下来，写进 run.yaml：换 rank 数续训时叶子不变。

    Raises:
        ValueError: 一批分不匀。
    """
    if config.micro_batch is not None:
        return config
    stages = stages_of(config.parallel)
    parts = data_ranks * stages
    unit = 2 if config.objective.kind == "dpo" else 1  # 一对两行不可拆开
    if rest := config.batch_size % (least := unit * parts):
        pairs = ", in whole pairs of rows" if unit == 2 else ""
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided evenly over {data_ranks} ranks that "
            f"read rows x {stages} pipeline stages{pairs}: use batch_size="
            f"{config.batch_size - rest + least}, or fewer ranks"
        )
    if config.parallel.exact and config.batch_size % (unit * max(LEAVES, parts)) == 0:
        parts = max(LEAVES, parts)
    return config.replace(micro_batch=config.batch_size // parts)


def peer_facts(config: TrainConfig, data: tuple[str, str], device: torch.device) -> dict[str, Any]:
    """各 rank 必须相同的；名字就是报错里的。"""
    facts: dict[str, Any] = {f"{name} (version)": version for name, version in versions().items()}
    facts |= {"source code": _code(), "threads": torch.get_num_threads(), "device": device.type}
    facts |= {"training data": data[0][:12], "validation data": data[1][:12]}
    return facts | dict(flat(config.to_dict()))


def _code() -> str:
    """app 的全部源码的指纹：几台机器可能检出了不同的提交。"""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def goes_on_exactly(state: Mapping[str, Any] | None) -> bool:
    """检查点是在固定的树上训练的：没有 --ranks 也照样一个 rank 的树，位才不变。"""
    return state is not None and state.get("summing") == _TREE


def keep_threads(state: Mapping[str, Any], tell: Tell) -> None:
    """同样的位要同样的线程数；用户自己定了线程数就听他的（resume 会提醒）。"""
    before = state.get("threads")
    said = f"trained by {state.get('ranks', 1)} ranks in exact mode: going on with one"
    if isinstance(before, int) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(before)
        said += f", threads {before}"
    tell(f"note: {said}; --ranks N divides the work again, with the same bits")


def changed_summing(state: Mapping[str, Any], summing: str) -> str | None:
    """续训时相加的办法变了就说清；None = 没有变。"""
    before = state.get("summing", "plain")
    if before == summing:
        return None
    names = {
        "plain": "in one process without ranks",
        _TREE: "in a fixed tree",
        "all_reduce": "by all_reduce (parallel.exact=false)",
    }
    return (
        f"warning: gradients were summed {names[before]}, now {names[summing]}; dropout masks "
        "and last bits change from here: no exact continuation"
    )

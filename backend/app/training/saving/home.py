"""一次训练住在哪里：run.yaml 所在的训练文件夹，不管里面的 out 怎么写。

文件夹会被复制、移走、改名，命令会从别处敲；out 与 data.folder 却是当初的相对路径。照着它们走，
`cp -r a b` 之后续 b 就会去续 a，删它的检查点、盖它的文件。
本文件不导入 torch，也不导入 numpy：`--help` 也经过这里。
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.common.files import write_atomic

from ..config import TrainConfig
from .checkpoint import list_steps

ORIGIN = "origin.json"
# 训练自己写下的、从不手写的文件：有其一就是训练文件夹，哪怕还没有检查点。
_MARKS = ("metrics.jsonl", "facts.json", ORIGIN)


def is_run(folder: Path) -> bool:
    return bool(list_steps(folder)) or any((folder / name).is_file() for name in _MARKS)


def home_of(run_file: Path) -> Path | None:
    """run_file 所在的训练文件夹；它不在训练文件夹里（只是一份设置）则 None。"""
    folder = run_file.parent
    # "." 与 ".." 存进 run.yaml 就到处都成立了，所以写全。
    if not folder.name or ".." in folder.parts:
        folder = Path(os.path.abspath(folder))
    return folder if is_run(folder) else None


def at_home(run_file: Path, config: TrainConfig) -> TrainConfig:
    """从 run_file 读出的设置，out 与 data.folder 换成此刻真正的地方；只是一份设置则原样。"""
    home = home_of(run_file)
    if home is None:
        return config
    val = {name: _first_there(home, config, place) for name, place in config.data.val.items()}
    data = dataclasses.replace(config.data, folder=_find_data(home, config), val=val)
    return config.replace(out=str(home), data=data)


def home_lines(run_file: Path, written: TrainConfig, config: TrainConfig) -> list[str]:
    """训练在哪里、数据在哪里，凡与 run_file 里写的不同都说一句。

    Args:
        written: run_file 里的原话；config 是命令行盖过之后的。
    """
    home = home_of(run_file)
    if home is None:
        return []
    lines = []
    if not _same(Path(config.out), home):
        lines.append(
            f"note: out={config.out} is a run of its own with the settings of {run_file}; "
            f"the run in {home} is left as it is"
        )
    elif not _same(Path(written.out), home):
        lines.append(f"note: the run is {home}, where {run_file.name} lies (it says {written.out})")
    if config.data.folder == written.data.folder and not Path(config.data.folder).is_dir():
        known = _origin(home).get("data")
        then = "" if known is None else f", and it is no longer in {known}"
        lines.append(
            f"note: data.folder={config.data.folder} of {run_file} is not in {Path.cwd()}{then}: "
            "give --data.folder"
        )
    elif not _same(Path(config.data.folder), Path(written.data.folder)):
        lines.append(f"note: data from {config.data.folder} ({run_file.name} says "
                     f"{written.data.folder})")  # fmt: skip
    return lines


def leave_origin(run: Path, config: TrainConfig, fingerprint: str) -> None:
    """记下数据此刻在哪里、是哪一份：训练文件夹搬走之后靠它找到数据。"""
    facts = {"data": os.path.abspath(config.data.folder), "fingerprint": fingerprint}
    write_atomic(run / ORIGIN, (json.dumps(facts, indent=1) + "\n").encode("ascii"))


def _same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


def _find_data(home: Path, config: TrainConfig) -> str:
    """几处里第一份内容相同的数据；没有就第一处存在的；都没有就照原话，由打开数据时拒绝。"""
    places = list(dict.fromkeys(_places(home, config)))
    wanted = _origin(home).get("fingerprint")
    for place in places:
        if wanted is not None and _fingerprint(Path(place)) == wanted:
            return place
    return next((p for p in places if (Path(p) / "train").is_dir()), config.data.folder)


def _first_there(home: Path, config: TrainConfig, folder: str) -> str:
    places = _from_here(home, config, folder)
    return next((place for place in places if Path(place).is_dir()), folder)


def _from_here(home: Path, config: TrainConfig, folder: str) -> Iterator[str]:
    yield folder
    if not os.path.isabs(folder):
        # 训练没有搬动，只是从别处敲的命令：当初的当前文件夹就是 home 去掉 out。
        parts, out = home.absolute().parts, Path(config.out).parts
        if not os.path.isabs(config.out) and parts[-len(out) :] == out:
            yield str(Path(*parts[: -len(out)]) / folder)


def _places(home: Path, config: TrainConfig) -> Iterator[str]:
    yield from _from_here(home, config, config.data.folder)
    known = _origin(home).get("data")
    if known is not None:
        yield known


def _origin(home: Path) -> dict[str, str]:
    """没有（更早的训练）或读不懂就当没有：它只帮着找数据，找错了有指纹拦着。"""
    try:
        data = json.loads((home / ORIGIN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, Any] = data if isinstance(data, dict) else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _fingerprint(folder: Path) -> str | None:
    from app.data.shards import fingerprint

    try:
        return fingerprint(json.loads((folder / "train" / "meta.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None

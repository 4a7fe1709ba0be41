"""同样的数据与种子，一次只换开关：展开成一串训练，逐个做完，能续的续，做过的不重做。"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.common.tell import Tell

from .config import TrainConfig, flat
from .report.history import History
from .report.metrics import METRICS
from .report.run_facts import Decisions
from .saving.checkpoint import find_latest, step_of
from .saving.resume import RUN_FILE, SILENT, check_out

# 各有各的办法，或换了就不可比。
_FIXED = {
    "out": "--out names the folder of the whole sweep",
    "resume": "a sweep resumes by itself",
    "seed": "use --seeds",
    "data.folder": "losses on different data do not compare",
}


@dataclass(frozen=True)
class Switch:
    """一个开关与它的几个值。"""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """stopped：收到的信号；failed：没有学成的训练 (文件夹, 原因)。"""

    done: list[Path]
    failed: list[tuple[Path, str]]
    stopped: str | None


def parse_switch(text: str) -> Switch:
    """`model.norm=post,pre` -> Switch；括号里的逗号不分开，值按 YAML 读。

    Raises:
        ValueError: 没有等号或值，值重复，或这个开关不许换。
    """
    name, sign, rest = text.partition("=")
    name = name.strip().replace("-", "_")
    if not sign or not name or not rest.strip():
        raise ValueError(f"vary={text!r}: write it as name=value,value, e.g. model.norm=post,pre")
    if name in _FIXED:
        raise ValueError(f"vary={text!r}: {name} cannot vary: {_FIXED[name]}")
    words = [word.strip() for word in re.split(r",(?![^()\[\]]*[)\]])", rest)]
    try:
        values = tuple(yaml.safe_load(word) if word else None for word in words)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"vary={text!r} is not valid YAML: {reason}") from None
    if "" in words:
        raise ValueError(f"vary={text!r} has an empty value: remove the extra comma")
    return Switch(name, values)


def expand(
    base: TrainConfig, switches: Sequence[Switch], seeds: Sequence[int]
) -> list[TrainConfig]:
    """所有组合 × 种子，各在 base.out 下自己的文件夹里。

    Raises:
        ValueError: 未知的设置、坏值、重复的开关、种子或组合。
    """
    names = [switch.name for switch in switches]
    _once("vary", names)
    _once("seeds", [str(seed) for seed in seeds])
    configs: dict[Path, TrainConfig] = {}
    for values in itertools.product(*(switch.values for switch in switches)):
        chosen = dict(zip(names, values, strict=True))
        for seed in seeds:
            out = Path(base.out) / _folder_name(chosen, seed)
            config = _changed(base, chosen).replace(seed=seed, out=str(out), resume="auto")
            if out in configs or _same(config, configs.values()):
                raise ValueError(f"{out.name} comes up twice: two values of vary mean the same")
            configs[out] = config
    return list(configs.values())


def _once(what: str, given: list[str]) -> None:
    twice = [one for one in dict.fromkeys(given) if given.count(one) > 1]
    if twice:
        raise ValueError(f"{what} names {', '.join(twice)} twice: give each once")


def _changed(base: TrainConfig, chosen: dict[str, Any]) -> TrainConfig:
    data = base.to_dict()
    for name, value in chosen.items():
        *sections, last = name.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"vary={name}: {section} is not a group of settings")
        place[last] = value
    try:
        return TrainConfig.from_dict(data)
    except ValueError as error:
        said = ", ".join(f"{name}={value}" for name, value in chosen.items())
        raise ValueError(f"with {said}: {error}") from None


def _same(config: TrainConfig, others: Any) -> bool:
    return any(config.replace(out=other.out) == other for other in others)


def _folder_name(chosen: dict[str, Any], seed: int) -> str:
    parts = [f"{name.rpartition('.')[2]}-{value}" for name, value in chosen.items()]
    text = "_".join([*parts, f"seed-{seed}"])
    return re.sub(r"[^\w.+-]+", "-", text)


def check(config: TrainConfig) -> None:
    """这一个能开始或续上吗；什么也不写。

    Raises:
        ValueError: 数据、设备、后端、可调的部分或并行不行，或文件夹里是别的训练。
    """
    from app.distributed.check import check_alone
    from app.models.transformer.backends.choose import explain_backends

    from .machine.runtime import choose_runtime
    from .opened import open_data
    from .saving.tuned import check_tune
    from .watch.samples import check_prompt

    for name in ("epochs", "time_limit"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"{name}={value} lets each run of a sweep have its own length: give --steps"
            )
    check_tune(config)
    check_alone(config.parallel)
    # 内容由训练自己核对，每次只读一遍。
    sizes = dataclasses.replace(config.data, verify="size")
    data = open_data(config.replace(data=sizes), lambda text: None)
    runtime = choose_runtime(config)
    explain_backends(config.model, device=runtime.device, dtype=runtime.dtype, training=True)
    check_prompt(config, data.train.tokenizer())
    check_out(config)
    path = Path(config.out) / RUN_FILE
    if not path.is_file():
        return
    try:
        before = TrainConfig.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    old, new = dict(flat(before.to_dict())), dict(flat(config.to_dict()))
    for name in new:
        if old.get(name) != new[name] and name not in SILENT:
            raise ValueError(
                f"{config.out} holds a run with {name}={old.get(name)!r}, now {new[name]!r}: "
                "use another --out for the new sweep"
            )


def finished(config: TrainConfig) -> bool:
    """最后一步的检查点完好，且最后的验证（若有验证集）也做了。"""
    run = Path(config.out)
    newest, _ = find_latest(run)
    if newest is None or step_of(newest) != config.steps:
        return False
    history = History(run / METRICS)
    history.refresh()
    validated = any(row["step"] == config.steps for row in history.of("eval"))
    return validated or not (config.data.val or (Path(config.data.folder) / "val").is_dir())


def run_sweep(
    configs: Sequence[TrainConfig], show: Callable[[Decisions], object], tell: Tell
) -> Outcome:
    """逐个训练。不收敛的记下来，接着做别的：它也是一个结果。

    Raises:
        ValueError: 开始之前就看得出有一个不行；那时什么也没有写。
    """
    from .run import train
    from .trainer import TrainingDiverged

    for config in configs:
        check(config)
    done: list[Path] = []
    failed: list[tuple[Path, str]] = []
    for number, config in enumerate(configs, 1):
        run = Path(config.out)
        if finished(config):
            tell(f"--- {number}/{len(configs)} {run.name}: finished before ---")
            done.append(run)
            continue
        tell(f"--- {number}/{len(configs)} {run.name} ---")
        _forget_compiled()
        try:
            result = train(config, show if number == 1 else lambda decisions: None, tell)
        except TrainingDiverged as error:
            tell(f"diverged: {error}")
            failed.append((run, str(error)))
            continue
        if result.stopped:
            return Outcome(done, failed, result.stopped)
        done.append(run)
    return Outcome(done, failed, None)


def _forget_compiled() -> None:
    """各次的块是同一份代码：编译过的版本攒到上限，后面的就悄悄不编译了。"""
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()

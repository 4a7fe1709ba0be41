"""各项核验：通过与否，与量到的差。加一种并行的核验：写一个函数，列进 CHECKS。"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from app.distributed.comm import Ranks
from app.distributed.mesh import Mesh
from app.models.transformer.weights.own_folder import WEIGHTS_FILE
from app.training.config import OptimConfig
from app.training.optim.build import build_optimizer

from .setting import STEPS, Setting, Trained

# 梯度（float64）、几步之后的权重（不求逐位时）：见到的是 3e-15 与 1e-6，留了几倍。
_GRADIENT, _WEIGHTS = 1e-13, 1e-4
# 键的偏置没有梯度，只有舍入的零头；eps 小了 AdamW 会把零头放大成一步。
_ADAMW = OptimConfig(lr=1e-3, eps=1e-4)
_MUON = OptimConfig(name="muon", lr=1e-3, eps=1e-4)


class Found(NamedTuple):
    passed: bool
    said: str


def collectives(setting: Setting) -> Found:
    """每种集合通信在这里的设备上是它说的意思。"""
    ranks = setting.mesh.world
    x = torch.arange(6.0, device=setting.device).view(3, 2) + 10 * ranks.rank
    everyone = torch.stack([x - 10 * ranks.rank + 10 * r for r in range(ranks.size)])
    sent = torch.stack([x + r for r in range(ranks.size)])
    wrong = [
        name
        for name, got, want in (
            ("sum", ranks.sum(x.clone()), everyone.sum(0)),
            ("max", ranks.max(x.clone()), everyone.amax(0)),
            ("gather", ranks.gather(x), everyone),
            ("exchange", ranks.exchange(sent), everyone + ranks.rank),
            ("pass_on", ranks.pass_on(x), everyone[(ranks.rank - 1) % ranks.size]),
            ("broadcast", ranks.broadcast(x.clone()), everyone[0]),
        )
        if not torch.equal(got, want)
    ]
    return Found(not wrong, f"wrong: {', '.join(wrong)}" if wrong else "6 of 6")


def gradients(setting: Setting) -> Found:
    """float64 的梯度，与一个进程、整批的相对误差。"""
    found = []
    for mesh in (setting.mesh, Mesh()):
        losses: list[float] = []
        engine = setting.engine(mesh, _ADAMW, torch.float64)
        found.append((setting.gradients(engine, 0, losses), losses[0]))
    (ours, loss), (theirs, wanted) = found
    name, worst = _worst(ours, theirs)
    return Found(
        worst <= _GRADIENT and abs(loss - wanted) <= _GRADIENT * abs(wanted),
        f"relative error {worst:.1e} in {name} (limit {_GRADIENT:.0e}), loss {loss - wanted:+.1e}",
    )


def adamw(setting: Setting) -> Found:
    return _trained(setting, _ADAMW)


def muon(setting: Setting) -> Found:
    return _trained(setting, _MUON)


def files(setting: Setting) -> Found:
    """流过 rank 0 写的 model.safetensors，与一个进程写的是同样的字节。"""
    world = setting.mesh.world
    shas = []
    for mesh, ranks in ((setting.mesh, world), (Mesh(), Ranks())):
        engine = setting.engine(mesh, _ADAMW, torch.float32)
        optimizer, _ = build_optimizer(engine.model, _ADAMW)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            engine.save(partial(engine.write, folder, optimizer), optimizer)
            path = folder / WEIGHTS_FILE
            sha = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        shas.append(ranks.agree(sha))
    return Found(shas[0] == shas[1], f"sha256 {shas[0][:12]} and {shas[1][:12]}")


CHECKS: tuple[tuple[str, Callable[[Setting], Found]], ...] = (
    ("collectives on this device", collectives),
    ("gradients equal one process", gradients),
    (f"AdamW, {STEPS} steps, equals one process", adamw),
    (f"Muon, {STEPS} steps, equals one process", muon),
    ("the checkpoint equals one process's", files),
)


def _trained(setting: Setting, optim: OptimConfig) -> Found:
    """固定的树在 CPU 上须逐位相同；别的设备没有量过，只报出差多少。"""
    ours, theirs = (setting.train(mesh, optim) for mesh in (setting.mesh, Mesh()))
    same = _same(ours, theirs)
    if same:
        return Found(True, "the same bits")
    name, worst = _worst(ours.weights, theirs.weights)
    said = f"relative difference {worst:.1e} in {name}"
    if ours.summing == "tree" and setting.device.type == "cpu":
        return Found(False, f"{said}: parallel.exact=true promises the same bits")
    return Found(worst <= _WEIGHTS, f"{said} (limit {_WEIGHTS:.0e}), not the same bits")


def _same(a: Trained, b: Trained) -> bool:
    weights = all(torch.equal(a.weights[name], value) for name, value in b.weights.items())
    return weights and a.losses == b.losses and a.norms == b.norms


def _worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[str, float]:
    """相对误差（最大的差除以最大的值）最大的张量与它。"""
    errors = {
        name: float((ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in theirs.items()
    }
    return max(errors.items(), key=lambda item: item[1])

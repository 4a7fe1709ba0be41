"""优化器：配置里的每个名字都登记着，登记了就用得上，谁也不必再问名字。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from app.models.transformer import GPT2Config, GPT2Model
from app.planning.footprint import footprint
from app.training.config import OptimConfig, Optimizer
from app.training.optim import build

SHAPE = GPT2Config(vocab_size=13, context_size=6, n_layer=2, n_head=2, n_embed=8)


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_name_builds_itself(name: Optimizer) -> None:
    config = OptimConfig(name=name)
    assert build.optimizer_kind(config).keeps
    optimizer, why = build.build_optimizer(GPT2Model(SHAPE), config)
    assert why and all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == len(list(GPT2Model(SHAPE).parameters()))


def test_one_that_registers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """只写一个类：训练用它建，计划按它说的记账。"""
    monkeypatch.setattr(build, "_KINDS", {})

    @build.register("adamw")
    class Plain(build.OptimizerKind):
        keeps = "nothing"

        def build(self, model: GPT2Model) -> tuple[torch.optim.Optimizer, str]:
            return torch.optim.SGD(model.parameters(), lr=self.config.lr), "plain descent"

        def state_bytes(self, shapes: build.Shapes) -> int:
            return 7

    config = OptimConfig(lr=0.5)
    optimizer, why = build.build_optimizer(GPT2Model(SHAPE), config)
    assert isinstance(optimizer, torch.optim.SGD) and why == "plain descent"
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    cpu: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    kind = build.optimizer_kind(config)
    assert footprint(SHAPE, rows=1, passes=1, optimizer=kind, **cpu).optimizer == 7
    with pytest.raises(ValueError, match="'adamw' is registered twice: by Plain"):
        build.register("adamw")


def test_a_name_the_configuration_lacks() -> None:
    with pytest.raises(ValueError, match=r"'lion' is not one of \['adamw', 'muon'\]: add it to"):
        build.register("lion")  # type: ignore[arg-type]


def test_the_configuration_needs_no_torch() -> None:
    code = "import sys, app.training.config; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    assert done.returncode == 0

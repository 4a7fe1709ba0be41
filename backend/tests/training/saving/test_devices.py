"""换了设备接着训：存下时有显卡、此刻没有，随机数、优化器与说的话都对。"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.models.transformer import GPT2Model
from app.training.optim.build import build_optimizer
from app.training.saving.resume import check_same_machine
from app.training.saving.state import (
    load_optimizer_tensors,
    optimizer_tensors,
    random_state,
    set_random_state,
)

from ..conftest import Make


def test_states_of_cards_that_are_not_here_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    saved = random_state() | {"cuda": ["0011"] * 2}
    wanted = torch.rand(4)
    set_random_state(saved)
    assert torch.equal(torch.rand(4), wanted)
    given: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: given.append(index))
    set_random_state(saved)
    assert given == [0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_kept_in_another_precision_and_place_return(make: Make, name: str) -> None:
    """CUDA 的融合 AdamW 把步数存成设备上的 float32 标量；读回之后接着数。"""
    config = make()
    optim: Any = config.optim.__class__(name=name)
    models = [GPT2Model(config.model) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, optim)[0] for model in models]

    def step(which: int) -> None:
        source = torch.Generator().manual_seed(5)
        for p in models[which].parameters():
            p.grad = torch.randn(p.shape, generator=source)
        optimizers[which].step()

    step(0)
    models[1].load_state_dict(models[0].state_dict())
    kept = {
        key: value.double() if key.startswith("step/") else value.clone()
        for key, value in optimizer_tensors(models[0], optimizers[0]).items()
    }
    load_optimizer_tensors(models[1], optimizers[1], kept)
    for which in (0, 1):
        step(which)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_device_is_said() -> None:
    told: list[str] = []
    state = {"device": "cuda", "precision": "torch.bfloat16"}
    check_same_machine(state, {"device": "cpu", "precision": "torch.float32"}, told.append)
    assert [line.split(":")[0] for line in told] == [
        "note", "note",
    ] and "device was 'cuda', now 'cpu'" in told[0]  # fmt: skip

"""喂显卡：先读好的一批就是那一步的一批；一步里只等设备一次。"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from app.models.transformer import GPT2Model
from app.models.transformer.config import MoEConfig
from app.training.config import ScheduleConfig
from app.training.machine import runtime
from app.training.machine.feeding import Prefetch, to_device
from app.training.saving.checkpoint import step_folder
from app.training.step import first_bad_weight
from app.training.trainer import Trainer

from ...syncs import counted
from ..conftest import Make, same_weights, train

CARD = torch.device("cuda")


def test_what_was_read_ahead_is_the_batch_of_its_step_and_nothing_is_read_twice() -> None:
    read: list[int] = []

    def batch(step: int) -> int:
        read.append(step)
        return 10 * step

    feed = Prefetch(batch, CARD)
    taken = []
    for step in (0, 1, 2):
        taken.append(feed.take(step))
        feed.look_ahead(step + 1)
    assert taken == [0, 10, 20] and read == [0, 1, 2, 3]
    # 续训到别的步：先读好的作废。
    assert feed.take(7) == 70 and feed.take(8) == 80
    assert read == [0, 1, 2, 3, 7, 8]


def test_a_batch_that_cannot_be_read_fails_at_its_own_step() -> None:
    def batch(step: int) -> int:
        if step == 1:
            raise ValueError("the shard was cut")
        return step

    feed = Prefetch(batch, CARD)
    assert feed.take(0) == 0
    feed.look_ahead(1)
    with pytest.raises(ValueError, match="cut"):
        feed.take(1)


def test_a_cpu_reads_nothing_ahead_and_copies_nothing() -> None:
    feed = Prefetch(lambda step: pytest.fail("read ahead"), torch.device("cpu"))
    feed.look_ahead(1)
    array = np.arange(6)
    assert to_device(array, torch.device("cpu")).data_ptr() == array.ctypes.data


def test_reading_ahead_changes_no_bit_also_over_a_resume(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(make(out=str(tmp_path / "plain")))
    start = Prefetch.__init__

    def eager(self: Prefetch, read: object, device: object) -> None:
        start(self, read, CARD)  # type: ignore[arg-type]

    monkeypatch.setattr(Prefetch, "__init__", eager)
    half = make(out=str(tmp_path / "ahead"), steps=6, save_every=3)
    train(half)
    middle = str(step_folder(tmp_path / "ahead", 3))
    again = train(make(out=str(tmp_path / "again"), resume=middle))
    assert same_weights(plain.checkpoint, again.checkpoint)


def test_float32_products_are_said_on_a_card_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime._products(torch.device("cpu")) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert runtime._products(CARD) == ("IEEE float32", "TF32 is off; bfloat16 is the fast way")
        assert torch.get_float32_matmul_precision() == "highest"
        # 环境把它钉住时要说出来。
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert "forced on" in runtime._products(CARD)[1]  # type: ignore[index]
    finally:
        torch.set_float32_matmul_precision(before)


EXPERTS = {"moe_num_experts": 4, "moe": MoEConfig(dispatch="grouped")}


@pytest.mark.parametrize("shape", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_training_step_waits_for_the_device_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, optim: str, shape: dict[str, object]
) -> None:
    waits, plain = [], Trainer._train_step

    def step(self: Trainer) -> None:
        with counted() as syncs:
            plain(self)
        waits.append(syncs.seen)

    monkeypatch.setattr(Trainer, "_train_step", step)
    config = make(steps=3, schedule=ScheduleConfig(warmup_steps=1))
    model = dataclasses.replace(config.model, **shape)
    train(config.replace(model=model, optim=dataclasses.replace(config.optim, name=optim)))
    assert waits == [["tolist"]] * 3


def test_a_step_that_reads_a_value_is_seen() -> None:
    with counted() as syncs:
        x = torch.ones(3)
        bool((x > 0).all())
        x[x > 0]
        x.sum().item()
    assert syncs.seen == ["aten::_local_scalar_dense", "aten::index", "aten::_local_scalar_dense"]


def test_finite_weights_are_checked_with_one_wait(make: Make) -> None:
    model = GPT2Model(make().model)
    with counted() as syncs:
        assert first_bad_weight(model) is None
    assert syncs.seen == ["tolist"]
    with torch.no_grad():
        model.h["1"].mlp.c_fc.weight[0, 0] = torch.nan
        model.h["1"].ln_2.weight[0] = torch.inf
    assert first_bad_weight(model) == "h.1.mlp.c_fc.weight"

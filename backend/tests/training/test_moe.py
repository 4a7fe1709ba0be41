"""混合专家的训练：均衡损失怎样加，偏置怎样更新，续训逐位相等，负载记在哪里。"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from app.adapters.trainable import apply_trainable
from app.data.batch import Batch
from app.data.feeding.examples import Examples, _filled
from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.training.config import OptimConfig, TrainConfig, TuneConfig
from app.training.machine.runtime import Runtime
from app.training.optim.build import build_optimizer
from app.training.optim.muon import ADAMW_RMS, orthogonalize
from app.training.report.run_page import REPORT
from app.training.saving.checkpoint import step_folder
from app.training.step import accumulate
from app.training.trainer import Trainer
from app.training.watch.expert_load import layer_balance, update_selection_bias

from .conftest import Make, rows, same_weights, train, weights

CPU = Runtime(torch.device("cpu"), "", torch.float32, "")
BIAS = "h.1.mlp.router.selection_bias"


def shape(dropout: float = 0.0, **moe: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=32, context_size=8, n_layer=2, n_head=2, n_embed=16, dropout=dropout,
        moe_num_experts=4, moe=MoEConfig(**moe),
    )  # fmt: skip


def loss_free(**more: Any) -> GPT2Config:
    return shape(router="sigmoid", bias_update_rate=0.01, **more)


def batch(n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(0)
    ids = source.integers(0, 32, (n, 9))
    inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    targets[0, 3:] = -100
    return inputs, targets


def gradients(model: GPT2Model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_max_vio_by_hand() -> None:
    """facts：(1,1,10,1,1,1,1,0) 的 MaxVio 是 4。"""
    found = layer_balance([1, 1, 10, 1, 1, 1, 1, 0], 8)
    assert found["max_vio"] == pytest.approx(4.0) and found["dead"] == 1
    assert found["drop_rate"] == 0.5 and found["load"][2] == 0.625
    even = layer_balance([3, 3, 3, 3], 0)
    assert even["max_vio"] == 0.0 and even["entropy"] == pytest.approx(1.0)
    assert layer_balance([0, 5], 0)["entropy"] == 0.0
    assert layer_balance([0, 0], 0)["max_vio"] == 0.0


def test_the_aux_loss_reaches_the_gradient_once_with_the_share_of_its_tokens() -> None:
    model = GPT2Model(shape(aux_loss_coef=0.5, z_loss_coef=0.1)).double()
    inputs, targets = batch()
    sums = accumulate(model, Batch(inputs, targets), 2, CPU)
    got = gradients(model)
    loads, aux = [], 0.0
    for part in (slice(0, 2), slice(2, 4)):
        share = np.count_nonzero(targets[part] != -100) / np.count_nonzero(targets != -100)
        x, y = torch.from_numpy(inputs[part]), torch.from_numpy(targets[part])
        out = model(x, targets=y)
        (share * (out["loss"] + out["aux_loss"])).backward()
        loads.append(out["expert_load"])
        aux += share * out["aux_loss"].item()
    for name, wanted in gradients(model).items():
        torch.testing.assert_close(got[name], wanted, rtol=0, atol=1e-12)
    assert sums.aux_loss.item() == pytest.approx(aux, abs=1e-12) and aux > 0.5
    assert sums.load is not None and torch.equal(sums.load, sum(loads))
    plain = accumulate(model, Batch(inputs, targets), 4, CPU)
    assert plain.loss.item() == pytest.approx(sums.loss.item(), abs=1e-12)
    assert plain.load is not None and torch.equal(plain.load, sums.load)
    dense = accumulate(GPT2Model(shape().dense()), Batch(inputs, targets), 4, CPU)
    assert dense.load is None and dense.aux_loss.item() == 0.0


def test_the_bias_moves_once_per_step_towards_the_idle(make: Make) -> None:
    model = GPT2Model(loss_free())
    load = torch.tensor([[4, 0, 2, 2], [1, 1, 1, 1]])
    update_selection_bias(model, load)
    first, second = (model.h[str(i)].mlp.router.selection_bias for i in range(2))
    assert torch.allclose(first, torch.tensor([-0.01, 0.01, 0.0, 0.0])) and not second.any()
    # 训练里：两个微批一步只动一次；步数就是移动的上限。
    config = make(model=loss_free(), steps=5)
    train(config)
    bias = weights(step_folder(Path(config.out), 5))[BIAS]
    assert bias.any()
    assert torch.allclose(bias / 0.01, (bias / 0.01).round(), atol=1e-4)
    assert bias.abs().max() <= 5 * 0.01 + 1e-6


def test_a_frozen_layer_keeps_its_bias() -> None:
    """适配器的检查点里没有偏置：训练中动了它，存下的就不是验证过的那个模型。"""
    for tune in ("lora", "last:1"):
        model = GPT2Model(loss_free())
        apply_trainable(model, TuneConfig(trainable=tune))
        update_selection_bias(model, torch.tensor([[4, 0, 2, 2], [4, 0, 2, 2]]))
        moved = [bool(model.h[str(i)].mlp.router.selection_bias.any()) for i in range(2)]
        assert moved == [False, tune == "last:1"]


def padded() -> Batch:
    """三例各一行，两行有补齐，第四行全是补齐。"""
    ids = np.random.default_rng(1).integers(0, 32, 9 + 5 + 3).astype(np.int64)
    source = Mock(n_tokens=17, document_starts=np.array([0, 9, 14]))
    source.read = lambda start, length: ids[start : start + length]
    held = [np.array(each, dtype=np.int64) for each in ([0], [1], [2], [])]
    return _filled(Examples(source, answers=False), held, 8)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_padding_is_neither_routed_nor_counted(capacity: float | None) -> None:
    """8 + 4 + 2 个真词元；有容量时补齐不占它们的位置：损失与只有真词元的三批之和相同。"""
    batch = padded()
    model = GPT2Model(shape(capacity_factor=capacity)).double()
    for micro in (1, 4):
        sums = accumulate(model, batch, micro, CPU)
        assert sums.load is not None and sums.load.sum(1).tolist() == [14 * 2] * 2
    alone = []
    for row, tokens in enumerate((8, 4, 2)):
        one = Batch(batch.inputs[row : row + 1, :tokens], batch.targets[row : row + 1, :tokens])
        alone.append(float(accumulate(model, one, 1, CPU).loss) * tokens / 14)
    assert sum(alone) == pytest.approx(float(accumulate(model, batch, 1, CPU).loss), abs=1e-12)


def test_the_mask_is_there_only_with_padding() -> None:
    """没有补齐的仍走从前的路；稠密的模型有没有它，损失逐位相同。"""
    batch = padded()
    assert batch.mask is not None and batch.mask.sum(1).tolist() == [8, 4, 2, 0]
    source = Mock(n_tokens=18, document_starts=np.array([0, 9]))
    source.read = lambda start, length: np.arange(start, start + length)
    whole = _filled(Examples(source, answers=False), [np.array([0]), np.array([1])], 8)
    assert whole.mask is None
    model = GPT2Model(shape().dense())
    masked, plain = (accumulate(model, b, 2, CPU) for b in (batch, replace(batch, mask=None)))
    assert torch.equal(masked.loss, plain.loss)


def test_the_bias_evens_out_the_load() -> None:
    """路由器先偏向一个专家；关掉均衡损失，只靠偏置，MaxVio 降下来。"""
    found = {}
    for rate in (0.0, 0.005):
        torch.manual_seed(0)
        config = shape(router="sigmoid", bias_update_rate=rate, aux_loss_coef=0.0, z_loss_coef=0.0)
        model = GPT2Model(config)
        for block in model.h.values():
            block.mlp.router.weight.data.normal_(std=0.5)
        ids = torch.randint(0, 32, (64, 8))
        for _ in range(200):
            with torch.no_grad():
                load = model(ids)["expert_load"]
            update_selection_bias(model, load)
        found[rate] = max(layer_balance(one, 0)["max_vio"] for one in load.tolist())
    assert found[0.005] < 0.1 < 0.3 < found[0.0], found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact_with_the_bias(make: Make, tmp_path: Path, optimizer: str) -> None:
    plan = {
        "model": loss_free(dropout=0.1, jitter_noise=0.1, capacity_factor=1.0, shared_experts=1),
        "optim": OptimConfig(name=optimizer, lr=1e-2, grad_clip=0.5),  # type: ignore[arg-type]
        "steps": 10,
        "eval_every": 3,
    }
    straight = tmp_path / "straight"
    train(make(out=str(straight), save_every=1, keep_last=100, **plan))
    for step in (3, 7):
        out = tmp_path / f"from-{step}"
        train(make(out=str(out), resume=str(step_folder(straight, step)), **plan))
        assert same_weights(step_folder(out, 10), step_folder(straight, 10))
        for kind in ("train", "moe"):
            one, two = (
                [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run, kind)]
                for run in (out, straight)
            )
            assert one == [row for row in two if row["step"] > step] and one
    assert weights(step_folder(straight, 10))[BIAS].any()


def test_a_forgotten_bias_is_noticed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: dict[str, Any] = {"model": loss_free(), "steps": 8}
    straight = tmp_path / "straight"
    train(make(out=str(straight), save_every=1, keep_last=100, **plan))
    real = GPT2Model.load_state_dict

    def forget(self: GPT2Model, state: Any, **more: Any) -> Any:
        return real(self, {k: v * 0 if "bias" in k and "sel" in k else v for k, v in state.items()})

    monkeypatch.setattr(GPT2Model, "load_state_dict", forget)
    out = tmp_path / "branch"
    train(make(out=str(out), resume=str(step_folder(straight, 4)), **plan))
    assert not same_weights(step_folder(out, 8), step_folder(straight, 8))


def test_the_load_is_seen(make: Make) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make(
        model=shape(capacity_factor=0.5, layers=(1,)), steps=5, eval_every=2, tensorboard=True
    )
    train(config)
    run = Path(config.out)
    seen = rows(run, "moe")
    assert [row["step"] for row in seen] == [1, 3, 5]
    for row in seen:
        (layer,) = row["layers"].items()
        assert layer[0] == "1" and sum(layer[1]["load"]) == pytest.approx(1.0, abs=1e-5)
        assert 0 < layer[1]["drop_rate"] < 1 and 0 <= layer[1]["entropy"] <= 1
    assert all(row["aux_loss"] > 0 for row in rows(run))
    page = (run / REPORT).read_text(encoding="utf-8")
    for title in ("Busiest expert", "Balance of the experts", "Dropped by capacity"):
        assert title in page
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"experts max_vio/layer 1", "experts drop_rate/layer 1", "loss/experts"} <= set(tags)
    facts = json.loads((run / "facts.json").read_text())
    plan = {name: (value, why) for name, value, why in facts["plan"]}
    assert plan["dispatch"][0] == "sorted" and plan["experts"][0] == "4, top-2"
    dense = make(model=shape().dense(), out=str(run.parent / "dense"), steps=5)
    train(dense)
    assert "Busiest expert" not in (Path(dense.out) / REPORT).read_text(encoding="utf-8")
    assert "aux_loss" not in rows(dense.out)[0] and rows(dense.out, "moe") == []


def test_a_bad_step_moves_no_bias(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """非有限的一步没有更新，偏置也不动。"""
    real = Trainer._train_step

    def poisoned(self: Trainer) -> None:
        if self.step == 1:
            before = [m.clone() for n, m in self.model.named_buffers()]
            weight = self.model.get_parameter("h.0.mlp.router.weight")
            handle = weight.register_hook(lambda g: g * math.nan)
            real(self)
            handle.remove()
            assert all(
                torch.equal(a, b)
                for a, (_, b) in zip(before, self.model.named_buffers(), strict=True)
            )
        else:
            real(self)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    config = make(model=loss_free(), steps=5)
    result = train(config)
    assert result.skipped == 1 and rows(config.out, "skipped")[0]["where"].endswith("router.weight")


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"aux_loss_coef": 0.5}, False),
        ({"dispatch": "reference"}, False),
        ({"router": "softmax"}, True),
        ({"layers": (1,)}, True),
    ],
)
def test_what_may_change_on_resume(make: Make, change: dict[str, Any], refused: bool) -> None:
    config, told = make(model=shape(), save_every=2), []
    train(config)
    changed = config.replace(model=shape(**change), resume="auto", steps=7)
    if refused:
        with pytest.raises(ValueError, match=f"model.moe.{next(iter(change))}=.* the checkpoint"):
            train(changed)
        return
    train(changed, told)
    assert any("warning: model.moe." in line for line in told)


def test_another_number_of_experts_is_refused(make: Make) -> None:
    config = make(model=shape(), save_every=2)
    train(config)
    other = config.model.replace(moe_num_experts=8)
    with pytest.raises(ValueError, match="moe_num_experts=8 but the checkpoint has 4"):
        train(config.replace(model=other, resume="auto"))


def test_groups_of_the_optimizers() -> None:
    model = GPT2Model(shape(shared_experts=1).replace(activation="swiglu", norm="pre"))
    adamw, _ = build_optimizer(model, OptimConfig())
    decay, free = (set(group["names"]) for group in adamw.param_groups)
    stacked = {"h.0.mlp.experts.c_fc", "h.0.mlp.experts.c_proj"}
    assert {f"{n}.weight" for n in stacked} | {"h.0.mlp.router.weight"} <= decay
    assert {f"{n}.bias" for n in stacked} <= free
    muon, _ = build_optimizer(model, OptimConfig(name="muon"))
    names = dict(zip(muon.param_groups[0]["names"], muon.param_groups[0]["parts"], strict=True))
    hidden = model.config.expert_hidden
    assert names["h.1.mlp.experts.c_fc.weight"] == [hidden] * 8
    assert names["h.1.mlp.experts.c_proj.weight"] == [16] * 4
    assert names["h.1.mlp.shared.c_fc.weight"] == [hidden] * 2
    assert not any("router" in name for name in names)


def test_muon_treats_each_expert_alone() -> None:
    model = GPT2Model(shape()).double()
    optimizer, _ = build_optimizer(model, OptimConfig(name="muon", lr=0.01, weight_decay=0.0))
    weight = model.get_parameter("h.0.mlp.experts.c_fc.weight")
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    weight.grad[2] = 0.0  # type: ignore[index]
    optimizer.step()
    moved = before - weight.detach()
    scale = 0.01 * ADAMW_RMS * math.sqrt(max(weight.shape[1:]))
    for e in (0, 1, 3):
        wanted = orthogonalize(weight.grad[e][None])[0] * scale  # type: ignore[index]
        torch.testing.assert_close(moved[e], wanted, rtol=1e-9, atol=1e-12)
    assert not moved[2].any()


def test_run_file_and_flags_reach_the_nested_settings(tmp_path: Path) -> None:
    from app.cli.commands.train import parse

    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {vocab_size: 32, moe_num_experts: 8, moe: {router: sigmoid, z_loss_coef: 1e-4,"
        " layers: [1, 3]}}\n"
    )
    argv = ["--config", str(path), "--model.moe.shared-experts", "1", "--model.moe-top-k", "4"]
    model = parse(argv).train.model
    assert (model.moe.router, model.moe.z_loss_coef, model.moe.layers) == ("sigmoid", 1e-4, (1, 3))
    assert (model.moe.shared_experts, model.moe_top_k, model.moe_num_experts) == (1, 4, 8)
    config = TrainConfig(model=model)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    flags = parse(["--model.moe-num-experts", "4", "--model.moe.layers", "0", "2"])
    assert flags.train.model.moe_layers == (0, 2)
    path.write_text("model: {moe_num_experts: 8, moe: {ruoter: sigmoid}}\n")
    with pytest.raises(ValueError, match=r"unknown option 'model.moe.ruoter': did you mean 'rout"):
        parse(["--config", str(path)])

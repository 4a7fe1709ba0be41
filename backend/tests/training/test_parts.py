"""小件：配置、学习率、参数分组、微批求和、运行方式、指标、平滑。"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.batch import Batch
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.loss import cross_entropy
from app.training import run as run_module
from app.training.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
from app.training.machine.runtime import Runtime, choose_runtime, compile_blocks
from app.training.machine.stop_signal import StopSignal
from app.training.optim.build import build_optimizer
from app.training.optim.schedule import learning_rate
from app.training.report.metrics import Metrics, read_metrics
from app.training.step import accumulate, expected_initial_loss
from app.viz.chart import smooth

CPU = Runtime(torch.device("cpu"), "", torch.float32, "")


def tiny(**changes: Any) -> GPT2Config:
    values = {"vocab_size": 13, "context_size": 6, "n_layer": 2, "n_head": 2, "n_embed": 8}
    return GPT2Config(**(values | {"dropout": 0.0} | changes))


# ---- 配置 ----


def test_config_round_trips_through_json() -> None:
    config = TrainConfig(
        model=tiny(), optim=OptimConfig(lr=1e-4, betas=(0.8, 0.9)), micro_batch=3, seed=7
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_written_as_text_become_floats() -> None:
    data = {"optim": {"lr": "1e-3", "betas": ["9e-1", 0.5]}, "model": {"dropout": "1e-1"}}
    config = TrainConfig.from_dict(data)
    assert (config.optim.lr, config.optim.betas) == (1e-3, (0.9, 0.5))
    assert config.model.dropout == 0.1
    assert TrainConfig.from_dict({"optim": {"muon_lr": "2e-2"}}).optim.muon_lr == 2e-2
    assert type(TrainConfig.from_dict({"optim": {"grad_clip": 1}}).optim.grad_clip) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"setps": 5}, r"unknown option 'setps': did you mean 'steps'\?"),
        ({"optim": {"learnrate": 1}}, r"unknown option 'optim.learnrate'"),
        ({"optim": {"betass": [0.9, 0.9]}}, r"did you mean 'betas'"),
        ({"model": {"n_lyer": 2}}, r"unknown option 'model.n_lyer': did you mean 'n_layer'"),
        ({"optim": {"lr": "fast"}}, r"optim.lr='fast' is not a number"),
        ({"optim": {"lr": 0}}, r"lr=0.0 must be above 0"),
        ({"optim": {"lr": float("nan")}}, r"lr=nan must be a finite number"),
        ({"optim": {"betas": [0.9]}}, r"betas=\(0.9,\) must have 2 values"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"betas=\(0.9, 1.0\)"),
        ({"optim": 3}, r"optim must be a mapping"),
        ({"steps": "many"}, r"steps='many' has type str, expected int"),
        ({"steps": True}, r"steps=True has type bool"),
        ({"steps": 0}, r"steps=0 must be at least 1"),
        ({"optim": {"name": "sgd"}}, r"name='sgd' is not one of \['adamw', 'muon'\]"),
        ({"optim": {"muon_lr": 0}}, r"muon_lr=0.0 must be above 0"),
        ({"optim": {"muon_lr": "fast"}}, r"optim.muon_lr='fast' is not a number"),
        ({"schedule": {"kind": "step"}}, r"kind='step' is not one of"),
        ({"schedule": {"decay_fraction": 0}}, r"decay_fraction=0.0 must be above 0"),
        (
            {"steps": 200, "schedule": {"kind": "wsd", "decay_fraction": 0.5}},
            r"warmup_steps=100 and the decay over 100 steps .*do not fit below steps=200",
        ),
        ({"spike": "stop"}, r"spike='stop' is not one of"),
        ({"steps": 50}, r"schedule.warmup_steps=100 is not below steps=50"),
        ({"micro_batch": 64}, r"micro_batch=64 must be between 1 and batch_size=32"),
        ({"precision": "fp16"}, r"precision='fp16' is not one of"),
        ({"out": ""}, r"out is empty"),
        ([], r"the run file must be a mapping"),
    ],
)
def test_bad_configs_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(data)


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)]), _JUNK))
@settings(max_examples=200, deadline=None)
def test_junk_gives_value_errors_only(data: dict[str, Any]) -> None:
    try:
        TrainConfig.from_dict(data)
    except ValueError as error:
        assert str(error)


# ---- 学习率 ----


def test_schedule_shape() -> None:
    schedule = ScheduleConfig(warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(s, peak=1.0, steps=100, schedule=schedule) for s in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and max(rates) == 1.0
    assert rates[99] == pytest.approx(0.1) and min(rates[10:]) == pytest.approx(0.1)
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[10 + 89 // 2] == pytest.approx(0.55, abs=0.01)
    flat = ScheduleConfig(warmup_steps=0, min_lr_ratio=1.0)
    assert {learning_rate(s, peak=2.0, steps=5, schedule=flat) for s in range(9)} == {2.0}


# ---- 优化器 ----


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["post", "pre", "keel"])
def test_each_parameter_is_in_one_group(tied: bool, norm: Any) -> None:
    model = GPT2Model(tiny(tie_weights=tied, norm=norm))
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1))[0].param_groups
    members = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in members}) == len(members)
    assert sum(p.numel() for p in members) == model.num_parameters()
    heads = [p for p in members if p.shape == (13, 8)]
    assert len(heads) == (1 if tied else 2)
    decay, free = groups
    assert (decay["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decay["params"])
    assert all(p.ndim == 1 for p in free["params"])


def test_optimizer_matches_the_plain_formula() -> None:
    """一步 AdamW 与纸上的公式相同：衰减在前，修正后的动量在后。"""
    model = GPT2Model(tiny()).double()
    config = OptimConfig(lr=0.01, betas=(0.9, 0.99), weight_decay=0.5, grad_clip=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, why = build_optimizer(model, config)
    assert why == "fused AdamW"
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None
        decay = 1 - 0.01 * 0.5 if p.ndim >= 2 else 1.0
        wanted = before[name] * decay - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-14)


# ---- 微批 ----


def _gradients(micro: int, targets: np.ndarray, inputs: np.ndarray) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT2Model(tiny()).double()
    loss = accumulate(model, Batch(inputs, targets), micro, CPU).loss
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss), flat


@given(st.integers(1, 7), st.integers(0, 2**32 - 1), st.floats(0, 0.95))
@settings(max_examples=20, deadline=None)
def test_accumulation_equals_the_big_batch(micro: int, seed: int, hidden: float) -> None:
    """D19：-100 参差不齐、末个微批不满时也一样（float64）。"""
    source = np.random.default_rng(seed)
    inputs, targets = source.integers(0, 13, (2, 7, 6))
    targets[source.random(targets.shape) < hidden] = -100
    whole, together = _gradients(7, targets, inputs)
    loss, summed = _gradients(micro, targets, inputs)
    assert loss == pytest.approx(whole, rel=1e-12, abs=1e-15)
    assert (summed - together).abs().max() <= 1e-12 * max(1.0, float(together.abs().max()))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("vocab", [50, 1000])
def test_expected_initial_loss(norm: Any, vocab: int) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, context_size=32, n_layer=2, n_head=4, n_embed=64, dropout=0, norm=norm
    )
    model = GPT2Model(config)
    ids = torch.randint(vocab, (8, 32))
    seen = float(model(ids, targets=torch.randint(vocab, (8, 32)))["loss"].detach())
    assert math.log(vocab) < expected_initial_loss(model)
    assert seen == pytest.approx(expected_initial_loss(model), abs=0.3 if vocab == 50 else 0.1)


# ---- 运行方式 ----


def test_runtime_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(device="cpu")
    for amx, avx, wanted in ((False, False, torch.float32), (True, False, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        runtime = choose_runtime(config)
        assert runtime.dtype == wanted and "AMX" in runtime.dtype_why
    assert choose_runtime(config.replace(precision="float32")).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    asked = choose_runtime(config.replace(precision="bfloat16"))
    assert asked.dtype == torch.bfloat16 and "slow" in asked.dtype_why


def held(*blocks: torch.nn.Module) -> Any:
    """编译要的只是模型的这两样。"""
    return SimpleNamespace(h=dict(enumerate(blocks)), loss_chunk=cross_entropy)


def test_compile_choices() -> None:
    model, cpu = held(torch.nn.Linear(2, 2)), torch.device("cpu")
    assert compile_blocks(model, "off", cpu, lambda: 1 / 0, print) == "off: asked for"
    assert "(--compile on)" in compile_blocks(model, "auto", cpu, lambda: 1 / 0, print)


def test_compile_falls_back_with_one_line() -> None:
    block, told = torch.nn.Linear(2, 2), []
    names = list(block.state_dict())

    def probe() -> None:
        torch.rand(3)
        raise RuntimeError("no working C++ compiler\nlong story")

    before = torch.get_rng_state()
    state = compile_blocks(held(block), "on", torch.device("cpu"), probe, told.append)
    assert state == "off: compiling failed"
    assert told == ["compile failed, going on without: RuntimeError: no working C++ compiler"]
    assert block._compiled_call_impl is None and list(block.state_dict()) == names
    assert torch.equal(torch.get_rng_state(), before)
    assert block(torch.zeros(1, 2)).shape == (1, 2)


def test_ranks_compile_together_or_not_at_all() -> None:
    """编译不成的只有第二个 rank：第一个也退回，两边说同一句。"""
    said, cpu = "RuntimeError: no working C++ compiler", torch.device("cpu")
    for failed in (None, said):
        block, told = torch.nn.Linear(2, 2), []
        ranks = Mock(collect=Mock(side_effect=[[None, None], [None, failed]]))
        how = compile_blocks(held(block), "on", cpu, lambda: None, told.append, ranks)
        assert how == ("off: compiling failed" if failed else "on: per block")
        assert told == ([f"compile failed, going on without: {said}"] if failed else [])
        assert (block._compiled_call_impl is None) == bool(failed)
    without = Mock(collect=lambda mine: [mine, "no C++ compiler found"])
    how = compile_blocks(held(), "on", cpu, lambda: 1 / 0, print, without)
    assert how == "off: no C++ compiler found"


def test_a_signal_waits_for_the_compiling_of_other_ranks() -> None:
    """一个进程立刻停；几个 rank 的试跑里有集合操作，中途走不得。"""

    def compile(tell: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "on: per block"

    for alone, wanted in ((True, "off: SIGTERM while compiling"), (False, "on: per block")):
        with StopSignal() as stop:
            trainer = Mock(compile=compile, world=Mock(alone=alone))
            assert run_module._compile(trainer, stop, print) == wanted
            assert stop.requested == "SIGTERM"


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    said = compile_blocks(held(), "on", torch.device("cpu"), lambda: None, print)
    assert said == "off: no C++ compiler found (install g++)"


@pytest.mark.slow
def test_compiled_training_saves_plain_names(make: Any) -> None:
    from .conftest import rows, train, weights

    config = make(compile="on", model=make().model.replace(dropout=0.0))
    result = train(config)
    assert not [name for name in weights(result.checkpoint) if "_orig_mod" in name]
    eager = config.replace(compile="off", out=config.out + "-eager")
    train(eager)
    first, second = ([row["loss"] for row in rows(c.out)] for c in (config, eager))
    assert first == pytest.approx(second, rel=1e-4)


# ---- 指标与平滑 ----


def test_metrics_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, 0, print) as metrics:
        for step in range(4):
            metrics.write({"kind": "eval", "step": step, "loss": 1.0})
            metrics.write({"kind": "train", "step": step + 1, "loss": float("nan")})
            metrics.write({"kind": "skipped", "step": step + 1})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    with Metrics(path, 2, print) as metrics:
        metrics.write({"kind": "eval", "step": 2, "loss": 1.0})
    kinds = [(row["kind"], row["step"]) for row in read_metrics(path)]
    assert kinds == [
        ("eval", 0), ("train", 1), ("skipped", 1), ("eval", 1), ("train", 2), ("skipped", 2),
        ("eval", 2),
    ]  # fmt: skip
    assert "NaN" not in path.read_text()


def test_smooth_keeps_constants_and_starts_unbiased() -> None:
    np.testing.assert_allclose(smooth(np.full(300, 2.5)), 2.5, rtol=1e-12)
    values = np.linspace(4, 1, 300)
    assert smooth(values)[0] == values[0] and np.all(np.diff(smooth(values)) < 0)


def test_data_config_needs_text() -> None:
    with pytest.raises(ValueError, match="folder=3 has type int"):
        DataConfig(folder=3)  # type: ignore[arg-type]

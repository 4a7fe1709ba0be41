"""只训练一部分、有教师或参考时的内存：与真的分配的、autograd 留下的、一步里活着的相同。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.adapters.rows import grow_vocabulary
from app.adapters.trainable import apply_trainable
from app.cli.main import main
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers import loss as loss_module
from app.models.transformer.settings.tune_config import TuneConfig
from app.planning.fit import training_footprint
from app.planning.footprint import Footprint, activation_bytes, footprint, with_others
from app.planning.tuned import ALONE, Beside, parts_of
from app.training.config import OptimConfig, TrainConfig
from app.training.machine.runtime import Runtime
from app.training.objectives.distill import Distill
from app.training.objectives.language_model import LanguageModel
from app.training.objectives.objective import Objective, Rows
from app.training.optim.build import build_optimizer, optimizer_kind
from tests.live_bytes import LiveBytes
from tests.models.helpers import tiny_config, tokens

from .test_footprint import CPU, saved_bytes

ADAMW = OptimConfig()
RUNTIME = Runtime(CPU, "", torch.float32, "")
# (tune.trainable, 新词元, 形状的改动)
WAYS: dict[str, tuple[str, range, dict[str, Any]]] = {
    "lora": ("lora", range(0), {}),
    "lora, new rows": ("lora", range(33, 36), {}),
    "lora, new rows, untied": ("lora", range(33, 36), {"tie_weights": False}),
    "lora, experts": ("lora", range(0), {"moe_num_experts": 3}),
    "last": ("last:1", range(0), {}),
    "head": ("head", range(0), {}),
    "head, untied": ("head", range(0), {"tie_weights": False}),
    "names": ("h.1.mlp.*,ln_f.*", range(0), {}),
}


def shape(**changes: Any) -> GPT2Config:
    return tiny_config(norm="pre", dropout=0.0, **changes).replace(n_embed=64, n_layer=3)


def tuned(config: GPT2Config, tune: TuneConfig, new: range) -> GPT2Model:
    model = GPT2Model(config)
    if len(new):
        grow_vocabulary(model, len(new), new.start)
    apply_trainable(model, tune, new)
    return model.train()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_trained_and_frozen_is_counted(way: str) -> None:
    trainable, new, changes = WAYS[way]
    tune, config = TuneConfig(trainable=trainable), shape(**changes)
    model = tuned(config, tune, new)
    ids = tokens(2, config.context_size, vocab=30)
    model(ids, targets=ids)["loss"].backward()
    optimizer, _ = build_optimizer(model, ADAMW)
    optimizer.step()
    parts = parts_of(config, tune, new)
    found = footprint(
        config, rows=2, passes=1, optimizer=optimizer_kind(ADAMW), device=CPU,
        dtype=torch.float32, parts=parts,
    )  # fmt: skip
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    held = (x for one in optimizer.state.values() for x in one.values() if isinstance(x, Tensor))
    assert found.optimizer == sum(x.nbytes for x in held if x.dim() > 0)
    trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert parts.trained == trained
    # 激活宁多不少：冻结而没有适配器的矩阵不必留输入，这里算上了。
    kept = saved_bytes(tuned(config, tune, new), 2, torch.float32)
    assert kept <= found.activations + found.head
    if trainable == "lora" or "last" in way:
        assert found.activations <= 1.1 * kept
    else:
        whole = activation_bytes(config, rows=2, device=CPU, dtype=torch.float32)
        assert found.activations <= whole


def test_layers_below_the_lowest_trained_one_keep_nothing() -> None:
    def kept(trainable: str) -> int:
        config = shape()
        parts = parts_of(config, TuneConfig(trainable=trainable), range(0))
        return footprint(
            config, rows=2, passes=1, optimizer=optimizer_kind(ADAMW), device=CPU,
            dtype=torch.float32, parts=parts,
        ).activations  # fmt: skip

    one, two, all_three = (kept(f"last:{k}") for k in (1, 2, 3))
    assert all_three - two == two - one > 0


def step_peak(config: TrainConfig, objective: Objective) -> int:
    """权重、优化器与一步里活着的张量最多时的字节数；第二步，状态都在了。"""
    model = GPT2Model(config.model)
    apply_trainable(model, config.tune)
    optimizer, _ = build_optimizer(model.train(), config.optim)
    ids = tokens(config.rows_at_once, config.model.context_size, vocab=30)
    live = LiveBytes()
    for again in (False, True):
        with live:
            live.peak = live.now
            objective.score(model, Rows(ids, ids)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not again:
            live = LiveBytes()
    state = (x for one in optimizer.state.values() for x in one.values() if isinstance(x, Tensor))
    return live.peak + sum(x.nbytes for x in (*model.parameters(), *state))


def distilled(**changes: Any) -> tuple[TrainConfig, GPT2Model]:
    """权重、logits 与激活的比例如 GPT-2 small 一行：一块 logits 是权重的十分之一。"""
    config = tiny_config(norm="pre", dropout=0.0).replace(
        vocab_size=1000, context_size=64, n_embed=64, n_head=2
    )
    torch.manual_seed(0)
    train = TrainConfig(model=config, batch_size=2, micro_batch=2, optim=ADAMW, **changes)
    return train, GPT2Model(config).eval().requires_grad_(False)


def test_distilling_needs_little_more_than_training_and_the_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """试验 9：峰值不到普通训练加教师的 1.2 倍；plan 说的与数到的相差不到一成。"""
    config, teacher = distilled()
    weights = sum(p.nbytes for p in teacher.parameters())
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", weights // 10)
    plain = step_peak(config, LanguageModel())
    peak = step_peak(config, Distill(teacher, 0.5, 2.0)) + weights
    print(f"distillation: {peak / (plain + weights):.3f} of training and the teacher")
    assert plain + weights < peak < 1.2 * (plain + weights)
    # 多出的是几块 logits 与教师的隐状态；教师的整张 (N, V) 有 512 KB，藏不进来。
    hidden = config.tokens_per_step * config.model.n_embed * 4
    assert peak - plain - weights <= 3 * (weights // 10) + hidden
    said = training_footprint(config, RUNTIME, Beside(teacher=teacher.config))
    assert said.peak == pytest.approx(peak, rel=0.1)
    assert training_footprint(config, RUNTIME, ALONE).peak == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("trainable", ["lora", "last:1"])
def test_the_peak_of_a_tuned_step(trainable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1 << 16)
    config, _ = distilled(tune=TuneConfig(trainable=trainable), init_from="x")
    peak = step_peak(config, LanguageModel())
    assert training_footprint(config, RUNTIME, ALONE).peak == pytest.approx(peak, rel=0.15)


def test_a_reference_counts_before_the_start_only() -> None:
    config, teacher = distilled()
    weights = sum(p.nbytes for p in teacher.parameters())
    alone = training_footprint(config, RUNTIME, ALONE)
    beside = Beside(reference=teacher.config)
    said = training_footprint(config, RUNTIME, beside)
    assert said.reference == weights and said.peak == alone.peak
    # 只训练适配器时，开始之前的那一刻反而最多。
    small = Footprint(10, 0, 0, 0, 0, 0, 0, 0, 0, False)
    held = with_others(small, beside, 1, torch.float32, CPU)
    assert held.peak == 10 + weights


def test_plan_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT2Model(tiny_config(norm="pre"))
    model.save_pretrained(tmp_path / "start")
    words = ["plan", "--device", "cpu", "--init-from", str(tmp_path / "start")]
    nowhere = ["--data.folder", str(tmp_path / "none")]
    assert main([*words, *nowhere, "--tune.trainable", "lora"]) == 0
    said = capsys.readouterr().out
    parts = parts_of(model.config, TuneConfig(trainable="lora"), range(0))
    count = sum(torch.Size(x).numel() for x in parts.trained.values())
    assert f"{count:,} parameters" in said and f"{model.num_parameters():,} parameters" in said
    assert "no gradients, no optimizer state" in said
    distill = ["--objective.kind", "distill", "--objective.teacher", str(tmp_path / "start")]
    assert main([*words, *nowhere, *distill]) == 0
    assert "never trained" in capsys.readouterr().out
    gone = ["--objective.kind", "distill", "--objective.teacher", str(tmp_path / "gone")]
    assert main([*words, *nowhere, *gone]) == 2
    assert "gone does not exist" in capsys.readouterr().err
    assert main(["plan", "--device", "cpu", "--tune.trainable", "lora"]) == 2
    assert "--init-from" in capsys.readouterr().err

"""三种目标对照手算的数与十行的写法；切成微批、没有计分的、两张词表不同，都要对。"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.data.batch import UNSCORED, Batch, restarting
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers import loss as loss_module
from app.training.machine.runtime import Runtime
from app.training.objectives.distill import Distill, divergence
from app.training.objectives.language_model import LanguageModel
from app.training.objectives.objective import Objective
from app.training.objectives.preference import Preference
from app.training.step import Sums, accumulate

CPU = Runtime(torch.device("cpu"), "", torch.float32, "")
V, T = 23, 12


def model_of(seed: int, vocab: int = V, width: int = 16) -> GPT2Model:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, context_size=T, n_layer=2, n_head=2, n_embed=width, dropout=0.0
    )
    return GPT2Model(config).double().train()


def batch_of(scored: list[int], seed: int = 0) -> Batch:
    """第 i 行末尾 scored[i] 个目标计分；每行两例，末尾一段是补齐。"""
    random = np.random.default_rng(seed)
    inputs, targets = (random.integers(V, size=(len(scored), T)) for _ in range(2))
    for row, count in enumerate(scored):
        targets[row, : T - count] = UNSCORED
    segments = np.repeat([[0] * 4 + [1] * (T - 4)], len(scored), 0)
    reference = random.normal(-10, 3, len(scored))
    return Batch(inputs, targets, segments, restarting(segments), reference)


def objectives() -> dict[str, Objective]:
    return {
        "lm": LanguageModel(),
        "distill": Distill(model_of(9).eval().requires_grad_(False), 0.3, 2.0),
        "dpo": Preference(0.7, 0.2),
    }


def run(objective: Objective, batch: Batch, micro: int, seed: int = 1) -> tuple[Sums, list[Tensor]]:
    model = model_of(seed)
    sums = accumulate(model, batch, micro, CPU, objective)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return sums, grads


def worst(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def logits_of(model: GPT2Model, batch: Batch) -> Tensor:
    segments = torch.from_numpy(batch.segments)
    return model(torch.from_numpy(batch.inputs), segment_ids=segments)["logits"]


# ---- 十行的写法 ----


def plain_dpo(model: GPT2Model, batch: Batch, beta: float, sft: float) -> Tensor:
    targets = torch.from_numpy(batch.targets)
    logp = F.log_softmax(logits_of(model, batch), -1)
    each = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    total = (each * (targets != UNSCORED)).sum(1)
    losses = []
    for i in range(0, len(total), 2):
        counts = [int((targets[j] != UNSCORED).sum()) for j in (i, i + 1)]
        if 0 in counts:
            continue
        ratio = [total[j] - float(batch.reference[j]) for j in (i, i + 1)]
        loss = -torch.log(torch.sigmoid(beta * (ratio[0] - ratio[1])))
        losses.append(loss - sft * total[i] / counts[0])
    return torch.stack(losses).mean()


def plain_distill(student: GPT2Model, teacher: GPT2Model, batch: Batch, a: float, t: float) -> Any:
    keep = torch.from_numpy(batch.targets) != UNSCORED
    ours, theirs = logits_of(student, batch)[keep], logits_of(teacher, batch)[keep].detach()
    common = min(ours.shape[1], theirs.shape[1])
    p = F.softmax(theirs[:, :common] / t, -1)
    kl = (p * (p.log() - F.log_softmax(ours / t, -1)[:, :common])).sum(-1).mean()
    ce = F.cross_entropy(ours, torch.from_numpy(batch.targets)[keep])
    return (1 - a) * ce + a * t * t * kl, ce, kl


def gradients_of(model: GPT2Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


# ---- 手算的数 ----


@pytest.mark.parametrize(("margin", "loss"), [(3.0, 0.5543552444685272), (0.0, math.log(2))])
def test_dpo_by_hand(margin: float, loss: float) -> None:
    """margin 3、β .1：损失 .5543552，选中的对数概率的梯度 -.0425557；margin 0：ln 2。"""
    batch = batch_of([3, 3])
    model, objective = model_of(1), Preference(0.1, 0.0)
    logp = []
    for row in range(2):
        one = batch.rows(slice(row, row + 1))
        logp.append(-float(accumulate(model, one, 1, CPU).loss) * 3)
    given = Batch(
        batch.inputs, batch.targets, batch.segments,
        reference=np.array([logp[0] - margin, logp[1]]),
    )  # fmt: skip
    sums = accumulate(model_of(1), given, 2, CPU, objective)
    assert float(sums.loss) == pytest.approx(loss, abs=1e-12)
    assert sums.numbers is not None
    found = dict(zip(objective.names, sums.numbers.tolist(), strict=True))
    assert found["margin"] == pytest.approx(0.1 * margin, abs=1e-12)
    assert [found["chosen"], found["rejected"]] == pytest.approx(logp, abs=1e-12)
    assert found["accuracy"] == (margin > 0) and sums.weight == 1


def test_the_slope_of_dpo_by_hand() -> None:
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (-F.logsigmoid(0.1 * x)).backward()
    assert x.grad is not None and float(x.grad) == pytest.approx(-0.0425557, abs=1e-7)
    # 同样的斜率经过整个模型：把选中的那一行的梯度与交叉熵的比。
    batch = batch_of([3, 3])
    logp = [
        -3 * float(run(LanguageModel(), batch.rows(slice(i, i + 1)), 1)[0].loss) for i in (0, 1)
    ]
    given = Batch(batch.inputs, batch.targets, batch.segments, None,
                  np.array([logp[0] - 3.0, logp[1]]))  # fmt: skip
    _, found = run(Preference(0.1, 0.0), given, 2)
    sides = [run(LanguageModel(), batch.rows(slice(i, i + 1)), 1)[1] for i in (0, 1)]
    slope = 0.1 / (1 + math.exp(0.3))
    wanted = [3 * slope * (c - r) for c, r in zip(*sides, strict=True)]
    assert worst(found, wanted) < 1e-12


@pytest.mark.parametrize(("t", "kl"), [(1.0, 0.0689593), (2.0, 0.0176386)])
def test_kl_by_hand(t: float, kl: float) -> None:
    """教师 (.5, .3, .2)、学生均匀；反过来是 .0703，不是它。"""
    teacher = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    found, grad = divergence(student.detach(), teacher, t)
    assert float(found) == pytest.approx(kl, abs=1e-7)
    p = F.softmax(teacher / t, -1)
    (p * (p.log() - F.log_softmax(student / t, -1))).sum().backward()
    assert student.grad is not None
    assert torch.allclose(grad, student.grad, atol=1e-15)
    if t == 2.0:
        assert 4 * float(found) == pytest.approx(0.0705546, abs=1e-6)


# ---- 对照 ----


@pytest.mark.parametrize("sft", [0.0, 0.3])
def test_dpo_against_ten_lines(sft: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 7 * V * 4)
    batch = batch_of([3, 5, 12, 1, 0, 0, 4, 4])
    sums, grads = run(Preference(0.7, sft), batch, 8)
    model = model_of(1)
    wanted = plain_dpo(model, batch, 0.7, sft)
    assert float(sums.loss) == pytest.approx(float(wanted), abs=1e-12)
    assert worst(grads, gradients_of(model, wanted)) < 1e-12
    assert sums.weight == 3


@pytest.mark.parametrize("vocab", [V, V - 5, V + 9])
def test_distill_against_whole_logits(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """分块与整张的；教师的词表可以少几行、多几行（补齐的）。"""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 7 * V * 4)
    teacher = model_of(9, max(vocab, V), width=8).eval().requires_grad_(False)
    if vocab < V:
        teacher.embed.wte.weight = torch.nn.Parameter(teacher.embed.wte.weight[:vocab])
    batch = batch_of([3, 5, 12, 1])
    batch = Batch(batch.inputs % min(vocab, V), batch.targets, batch.segments)
    if vocab < V:
        teacher.config = teacher.config.replace(vocab_size=V)
    sums, grads = run(Distill(teacher, 0.3, 2.0), batch, 4)
    model = model_of(1)
    wanted, ce, kl = plain_distill(model, teacher, batch, 0.3, 2.0)
    assert float(sums.loss) == pytest.approx(float(wanted), abs=1e-12)
    assert sums.numbers is not None
    assert sums.numbers.tolist() == pytest.approx([float(ce), float(kl)], abs=1e-12)
    assert worst(grads, gradients_of(model, wanted)) < 1e-12


def test_distill_with_alpha_0_is_the_language_model() -> None:
    """逐位。"""
    batch = batch_of([3, 5, 12, 1])
    teacher = model_of(9).eval().requires_grad_(False)
    plain, wanted = run(LanguageModel(), batch, 2)
    sums, grads = run(Distill(teacher, 0.0, 3.0), batch, 2)
    assert torch.equal(sums.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


class Largest(TorchDispatchMode):
    """见过的最大的张量有几个元素。"""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.numel())
        return out


@pytest.mark.parametrize("name", ["lm", "distill", "dpo"])
def test_whole_logits_never_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * V * 4)
    batch, seen = batch_of([T] * 8), Largest()
    with seen:
        run(objectives()[name], batch, 8)
    # 最大的是 (N, 4C) 的前馈；(N, V) 更大。
    wide = model_of(1).config.n_embed * 4
    assert seen.most <= max(8 * T * wide, V * wide)
    assert 4 * V < 8 * T * V


# ---- 微批 ----


@pytest.mark.parametrize("name", ["lm", "distill", "dpo"])
@pytest.mark.parametrize("micro", [2, 4, 6])
def test_any_micro_batches_give_the_gradient_of_the_whole(name: str, micro: int) -> None:
    """计分的个数 1:12，有的一个也没有：各自平均再平均就错了。"""
    batch = batch_of([1, 12, 12, 12, 0, 0, 1, 1, 5, 0, 12, 3])
    whole, wanted = run(objectives()[name], batch, len(batch))
    parts, found = run(objectives()[name], batch, micro)
    assert worst(found, wanted) < 1e-12 and parts.weight == whole.weight
    assert float(parts.loss) == pytest.approx(float(whole.loss), abs=1e-12)
    if whole.numbers is not None and parts.numbers is not None:
        assert torch.allclose(parts.numbers, whole.numbers, atol=1e-12)


@pytest.mark.parametrize("name", ["lm", "distill", "dpo"])
def test_nothing_scored_is_zero(name: str) -> None:
    sums, grads = run(objectives()[name], batch_of([0] * 4), 2)
    assert float(sums.loss) == 0.0 and sums.weight == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert sums.numbers is None or torch.isfinite(sums.numbers).all()


def test_dpo_counts_answers_only() -> None:
    """改提示里的目标（不计分）不动损失；两边对调，差变号。"""
    batch = batch_of([3, 5])
    sums, _ = run(Preference(0.5, 0.0), batch, 2)
    order = np.array([1, 0])
    swapped, _ = run(Preference(0.5, 0.0), batch.rows(order), 2)
    assert sums.numbers is not None and swapped.numbers is not None
    assert float(swapped.numbers[0]) == pytest.approx(-float(sums.numbers[0]), abs=1e-12)

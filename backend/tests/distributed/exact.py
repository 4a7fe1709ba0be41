"""多个 rank 的一步与一个进程的一步相比：同一个模型、同一批，float64。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from app.distributed.ways.way import Way, gradient_norm
from app.models.transformer import GPT2Config, GPT2Model

# 一个进程自己换个求和次序也差 1e-15。
GRADIENT, LOSS = 2e-14, 1e-14
ROWS, TOKENS, VOCAB = 4, 32, 96


class Batch(NamedTuple):
    """x、y (B, T)，y 有的行有 -100，有一行全是；segment 文档号与 mask，None = 没有打包、补齐。"""

    x: Tensor
    y: Tensor
    segment: Tensor | None = None
    mask: Tensor | None = None

    @property
    def places(self) -> dict[str, Tensor]:
        given = {"segment_ids": self.segment, "attention_mask": self.mask}
        return {name: x for name, x in given.items() if x is not None}


class Off(NamedTuple):
    """与一个进程相差多少：梯度是 max|差| / max|参照| 里最坏的一个参数。"""

    loss: float
    gradient: float
    norm: float
    where: str


def small_model(**changes: Any) -> GPT2Model:
    """float64；各参数都不是零，漏掉哪个的梯度都看得见。"""
    torch.manual_seed(1)
    base = {"vocab_size": VOCAB, "context_size": TOKENS, "n_layer": 2, "n_head": 4, "n_embed": 32}
    changes = {"dropout": 0.0, "norm": "pre"} | base | changes
    model = GPT2Model(GPT2Config(**changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def make_batch(packed: bool = False, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    torch.manual_seed(2)
    x, y = torch.randint(VOCAB, (2, rows, tokens))
    y[0, : tokens // 2] = -100
    y[1] = -100
    y[2, 5:9] = -100
    if not packed:
        return Batch(x, y)
    starts = torch.rand(rows, tokens) < 0.12
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[0, tokens - 3 :], mask[3, tokens // 3 :] = False, False
    return Batch(x, y.masked_fill(~mask, -100), starts.long().cumsum(1), mask)


def valid(y: Tensor) -> int:
    return int((y != -100).sum())


def one_step(model: GPT2Model, batch: Batch, total: int, micro: int = ROWS) -> float:
    """在各微批上反向；返回损失之和（MoE 的均衡损失也在梯度里，不在返回值里）。"""
    sum_of = 0.0
    for first in range(0, len(batch.x), micro):
        part = Batch(*(None if x is None else x[first : first + micro] for x in batch))  # type: ignore[arg-type]
        out = model(part.x, targets=part.y, **part.places)
        share = valid(part.y) / total
        wanted = out["loss"] + out.get("aux_loss", 0.0)
        (wanted * share).backward()
        sum_of += float(out["loss"].detach()) * share
    return sum_of


class Case(NamedTuple):
    """在父进程里备好（fork 之后各 rank 都有）：模型、一批、一个进程的损失与梯度。"""

    name: str
    model: GPT2Model
    batch: Batch
    loss: float
    gradients: dict[str, Tensor]


def make_case(name: str, model: GPT2Model, batch: Batch, micro: int = ROWS) -> Case:
    loss = one_step(model, batch, valid(batch.y), micro)
    want = gradients(model)
    model.zero_grad()
    return Case(name, model, batch, loss, want)


def gradients(model: GPT2Model) -> dict[str, Tensor]:
    """FSDP2 的拼成整个：各 rank 按同样的次序。"""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def compare(case: Case, ways: Sequence[Way], loss: float) -> Off:
    """finish_gradients 之后的 case.model 与已求和的损失；ways 由外到里：先拼最后一条轴。"""
    off, where, found = 0.0, "", gradients(case.model)
    for name, want in case.gradients.items():
        whole = found.get(name)
        for way in reversed(ways):
            whole = way.whole(name, whole)
        assert whole is not None, f"{name} has no gradient"
        this = float((whole - want).abs().max() / want.abs().max().clamp(min=1e-300))
        if this > off or this != this:
            off, where = this, name
    norm = float(gradient_norm(found, ways))
    right = float(sum(g.square().sum() for g in case.gradients.values())) ** 0.5
    return Off(abs(loss - case.loss), off, abs(norm - right) / right, where)


def summed(way: Way, loss: float) -> float:
    return float(way.ranks.sum(torch.tensor(loss, dtype=torch.float64)))


def assert_exact(found: dict[str, Off]) -> None:
    assert found
    for case, off in found.items():
        assert off.loss <= LOSS * 10, f"{case}: loss off by {off.loss:.1e}"
        assert off.gradient <= GRADIENT, f"{case}: {off.where} off by {off.gradient:.1e}"
        assert off.norm <= GRADIENT, f"{case}: norm off by {off.norm:.1e}"

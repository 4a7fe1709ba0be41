"""一行里的几例互不相见，恰好是零：改一例，别的例的 logits 一位不动；也等于各自单独一行。

B 批、T 词元数。位置（学得的、旋转、没有）× 图样 × 后端 × 头数，再加逐块编译。
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.backends.choose import explain_backends

LENGTHS = (5, 9, 2, 12)
T = sum(LENGTHS) + 4  # 末尾是补齐
V = 31
POSITIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope": {"position": "rope"},
    "none": {"position": "none"},
    "grouped": {"position": "rope", "n_kv_head": 2, "qk_norm": True},
}
PATTERNS = {
    "causal": None,
    "window": "local(4)",
    "sinks": "sinks(2, 4)",
    "strided": "strided(3)",
    "global": "local(3) | global(2)",
    "cycle": ("causal", "local(4)"),
}


def shape(**changes: Any) -> GPT2Config:
    values = {"vocab_size": V, "context_size": T, "n_layer": 2, "n_head": 4, "n_embed": 32}
    return GPT2Config(**(values | {"dropout": 0.0} | changes))


def packed() -> tuple[Tensor, Tensor]:
    """(1, T) 的词元与例号。"""
    torch.manual_seed(5)
    numbers = [i for i, n in enumerate((*LENGTHS, 4)) for _ in range(n)]
    return torch.randint(V, (1, T)), torch.tensor([numbers])


def rows_apart(ids: Tensor, segments: Tensor) -> list[Tensor]:
    return [ids[:, segments[0] == i] for i in range(len(LENGTHS))]


def leak(model: GPT2Model) -> float:
    """改每一例（与补齐），别的例的 logits 最多动多少。"""
    ids, segments = packed()
    before, most = model(ids, segment_ids=segments)["logits"], 0.0
    for i in range(len(LENGTHS) + 1):
        changed = torch.where(segments == i, (ids + 7) % V, ids)
        after = model(changed, segment_ids=segments)["logits"]
        others = segments[0] != i
        most = max(most, float((after - before)[:, others].detach().abs().max()))
        assert not torch.equal(after[:, ~others], before[:, ~others])
    return most


def check(model: GPT2Model, exact: float) -> None:
    assert leak(model) == 0.0
    ids, segments = packed()
    found = model(ids, segment_ids=segments)["logits"]
    for i, row in enumerate(rows_apart(ids, segments)):
        alone = model(row)["logits"]
        assert float((found[:, segments[0] == i] - alone).detach().abs().max()) <= exact


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_no_leak(position: str, pattern: str, backend: str) -> None:
    torch.manual_seed(0)
    config = shape(
        attention_pattern=PATTERNS[pattern], attention_backend=backend, **POSITIONS[position]
    )
    with torch.no_grad():
        check(GPT2Model(config).double(), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_no_leak_in_training_precision(backend: str) -> None:
    torch.manual_seed(0)
    config = shape(attention_pattern=("causal", "sinks(2, 4)"), attention_backend=backend)
    model = GPT2Model(config).train()
    check(model, 2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert leak(model) == 0.0


@pytest.mark.slow
def test_flex_does_not_leak() -> None:
    torch.manual_seed(0)
    config = shape(attention_pattern="local(4)", attention_backend="flex", n_head=2)
    with torch.no_grad():
        try:
            explain_backends(config, device=torch.device("cpu"))
            model = GPT2Model(config)
            check(model, 2e-6)
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled_blocks_do_not_leak(pattern: str) -> None:
    torch.manual_seed(0)
    model = GPT2Model(shape(attention_pattern=PATTERNS[pattern], position="rope")).train()
    for block in model.h.values():
        block.compile()
    check(model, 2e-6)


def test_gradients_of_a_packed_row_are_those_of_its_examples() -> None:
    """梯度也是：打包的一行 = 各例的和。"""
    torch.manual_seed(0)
    model = GPT2Model(shape(attention_pattern=("causal", "local(4)"))).double()
    ids, segments = packed()
    targets = torch.full_like(ids, -100)
    inside = torch.zeros_like(ids, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        at = (segments[0] == i).nonzero()[:-1, 0]
        targets[0, at], inside[0, at] = ids[0, at + 1], True
        assert len(at) == n - 1
    names = list(dict(model.named_parameters()))
    loss = model(ids, targets=targets, segment_ids=segments)["loss"]
    found = torch.autograd.grad(loss, list(model.parameters()))
    total = int(inside.sum())
    wanted = [torch.zeros_like(g) for g in found]
    whole = 0.0
    for row in rows_apart(ids, segments):
        part = model(row[:, :-1], targets=row[:, 1:])["loss"] * (row.shape[1] - 1) / total
        whole += float(part)
        for sum_, grad in zip(wanted, torch.autograd.grad(part, list(model.parameters())),
                              strict=True):  # fmt: skip
            sum_ += grad
    assert float(loss) == pytest.approx(whole, abs=1e-12)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-11, name

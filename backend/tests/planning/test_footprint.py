"""训练的内存：激活与 autograd 真的留下的相同，参数与优化器与真的分配的相同。"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.loss import CHUNK_BYTES, GPU_CHUNK_BYTES
from app.planning.footprint import activation_bytes, footprint, largest
from app.training.config import OptimConfig, Optimizer
from app.training.optim.build import build_optimizer, optimizer_kind
from tests.models.helpers import VARIANTS, tiny_config, tokens

ADAMW = optimizer_kind(OptimConfig())
CPU = torch.device("cpu")


def saved_bytes(model: GPT2Model, rows: int, dtype: torch.dtype) -> int:
    """前向之后为反向留着的字节数：参数与 id 之外，同一块存储只数一次。"""
    skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    ids = tokens(rows, model.config.context_size, vocab=model.config.vocab_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        loss = model(ids, targets=ids)["loss"]
    held = sum(
        x.untyped_storage().nbytes()
        for pointer, x in kept.items()
        if pointer not in skip and x.is_floating_point()
    )
    del loss
    return held


def counted(config: GPT2Config, rows: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    model = GPT2Model(config).train()
    found = activation_bytes(config, rows=rows, device=CPU, dtype=dtype)
    return found, saved_bytes(model, rows, dtype)


def per_token(config: GPT2Config, rows: int, floats: int) -> int:
    return rows * config.context_size * floats * 4


def test_gpt2_layer_by_hand() -> None:
    """pre、GELU：归一化 2C、c_attn C、qkv 3C、注意力的输出 C、c_fc C、GELU 的进与出 8C，共 16C。"""
    small = tiny_config(norm="pre", dropout=0.0)
    one, two = (
        activation_bytes(small.replace(n_layer=n), rows=1, device=CPU, dtype=torch.float32)
        for n in (1, 2)
    )
    statistics = 2 * 2 + small.n_head
    assert two - one == per_token(small, 1, 16 * small.n_embed + statistics)


MORE: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.1},
    "dropout, blocked": {"dropout": 0.1, **VARIANTS["blocked"]},
    "dropout, reference": {"dropout": 0.1, "attention_backend": "reference"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*VARIANTS, *MORE])
def test_activations_are_those_autograd_keeps(name: str, dtype: torch.dtype) -> None:
    """每层的增量，免得词表与两端的零头盖住差错；相差的只有不融合的写法不留的 log-sum-exp。"""
    changes = {"dropout": 0.0, **(VARIANTS | MORE)[name]}
    config = tiny_config(**changes).replace(n_embed=64)
    few, many = (counted(config.replace(n_layer=n), 2, dtype) for n in (2, 4))
    found, kept = (b - a for a, b in zip(few, many, strict=True))
    assert found == pytest.approx(kept, rel=0.02)


def test_the_optimizers_hold_what_is_said() -> None:
    for name in get_args(Optimizer):
        model = GPT2Model(tiny_config(norm="pre"))
        kind = optimizer_kind(OptimConfig(name=name))
        optimizer, _ = build_optimizer(model, kind.config)
        ids = tokens(1, 8)
        model(ids, targets=ids)["loss"].backward()
        optimizer.step()
        found = footprint(
            model.config, rows=1, passes=1, optimizer=kind, device=CPU, dtype=torch.float32
        )
        held = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim() > 0
        )
        assert found.optimizer == held
        assert found.weights == sum(p.nbytes for p in model.parameters()) == found.gradients
        assert found.gradients == sum(
            p.grad.nbytes for p in model.parameters() if p.grad is not None
        )


def test_logits_stay_chunks() -> None:
    def logits(rows: int, device: torch.device = CPU) -> int:
        config = GPT2Config(norm="pre")
        return footprint(
            config, rows=rows, passes=1, optimizer=ADAMW, device=device, dtype=torch.float32
        ).logits

    assert logits(1) == logits(64) <= CHUNK_BYTES
    assert CHUNK_BYTES < logits(64, torch.device("cuda")) <= GPU_CHUNK_BYTES
    whole = tiny_config()
    found = footprint(whole, rows=2, passes=1, optimizer=ADAMW, device=CPU, dtype=torch.float32)
    assert found.logits == 2 * 24 * 37 * 4


def test_the_peak_is_at_one_end_of_the_backward_pass() -> None:
    def peak(rows: int, passes: int) -> tuple[int, int]:
        found = footprint(
            GPT2Config(norm="pre", dropout=0.0), rows=rows, passes=passes, optimizer=ADAMW,
            device=CPU, dtype=torch.float32,
        )  # fmt: skip
        return found.peak - found.weights - found.optimizer, found.activations

    one, kept = peak(1, 1)
    head = 4 * 50304 * 768
    assert head + kept < one < head + kept + 100 * 2**20
    whole = 4 * sum(p.numel() for p in GPT2Model(GPT2Config(norm="pre")).parameters())
    accumulated, _ = peak(1, 2)
    assert accumulated - one == whole - head
    tiny = footprint(
        GPT2Config(norm="pre", context_size=8, dropout=0.0), rows=1, passes=1, optimizer=ADAMW,
        device=CPU, dtype=torch.float32,
    )  # fmt: skip
    assert tiny.peak == tiny.weights + tiny.optimizer + tiny.gradients + tiny.head


@pytest.mark.parametrize("limit", range(11))
def test_the_largest_that_fits(limit: int) -> None:
    assert largest(lambda n: n <= limit, 10) == limit
    assert largest(lambda n: n <= limit, 4) == min(limit, 4)

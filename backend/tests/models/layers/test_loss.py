"""分块的头与交叉熵：与整张 logits 的写法同值同梯度，而内存少得多。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.models.transformer.layers import loss as loss_module
from app.models.transformer.layers.loss import (
    cross_entropy,
    cross_entropy_fused,
    head_cross_entropy,
)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.flatten(0, 1) @ weight.T
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100)


def with_gradients(function, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = function(hidden, weight, targets)
    (value * scale).backward()
    return value.detach(), hidden.grad, weight.grad


@given(
    rows=st.integers(1, 5),
    length=st.integers(1, 9),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 2000),
    ignored=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_computation(
    rows: int, length: int, vocab: int, chunk: int, ignored: float, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, length, 6).double(), torch.randn(vocab, 6).double()
    targets = torch.randint(0, vocab, (rows, length))
    targets[torch.rand(rows, length) < ignored] = -100
    targets[0, 0] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_BYTES", chunk)
        got = with_gradients(head_cross_entropy, hidden, weight, targets, 3.0)
        with torch.no_grad():
            assert torch.allclose(head_cross_entropy(hidden, weight, targets), got[0], rtol=1e-12)
    for a, b in zip(got, with_gradients(naive, hidden, weight, targets, 3.0), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_float32_gradients_agree_to_1e_6() -> None:
    hidden, weight = torch.randn(4, 64, 32), 0.1 * torch.randn(5000, 32)
    targets = torch.randint(0, 5000, (4, 64))
    got = with_gradients(head_cross_entropy, hidden, weight, targets, 1.0)
    want = with_gradients(naive, hidden, weight, targets, 1.0)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() / b.abs().max() <= 1e-6


def test_the_chunk_written_for_the_compiler_is_the_same() -> None:
    logits, labels = torch.randn(9, 37, dtype=torch.float64), torch.randint(0, 37, (9,))
    labels[3] = -100
    loss, grad = cross_entropy_fused(logits, labels)
    wanted = cross_entropy(logits.clone(), labels)
    assert torch.allclose(loss, wanted[0], rtol=1e-13, atol=0)
    assert torch.allclose(grad, wanted[1], rtol=1e-13, atol=1e-15)
    narrow = cross_entropy_fused(logits.bfloat16(), labels)
    assert narrow[0].dtype == torch.float32 and narrow[1].dtype == torch.bfloat16
    hidden, weight = torch.randn(2, 5, 6).double(), torch.randn(11, 6).double()
    targets = torch.randint(0, 11, (2, 5))

    def fused(*given: Tensor) -> Tensor:
        return head_cross_entropy(*given, lambda x, y, rows: cross_entropy_fused(x, y))

    pairs = [with_gradients(f, hidden, weight, targets, 2.0) for f in (fused, head_cross_entropy)]
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_padded_vocabulary_is_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU 上半精度的词表补到 16 字节的整数倍；补出的词既不在损失里，也不在梯度里。"""
    hidden, weight = torch.randn(2, 5, 8).double(), torch.randn(37, 8).double()
    targets = torch.randint(0, 37, (2, 5))
    wanted = with_gradients(head_cross_entropy, hidden, weight, targets, 1.0)
    seen: list[tuple[int, ...]] = []

    def plain(logits: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        seen.append((*logits.shape, *logits.stride()))
        return cross_entropy(logits, labels, rows)

    def fused(logits: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return cross_entropy_fused(logits, labels)

    monkeypatch.setattr(loss_module, "padded_vocab", lambda weight: 64)
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"atol": 1e-5}
    for chunk in (plain, fused):
        got = with_gradients(
            lambda *one, chunk=chunk: head_cross_entropy(*one, chunk),
            hidden.to(dtype), weight.to(dtype), targets, 1.0,
        )  # fmt: skip
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a.double(), b, **close)
    assert seen == [(10, 37, 64, 1)]


def test_what_a_gpu_pads() -> None:
    """只看形状与设备：没有显卡，meta 也走那一支。"""
    for dtype, vocab, wanted in (
        (torch.bfloat16, 50257, 50304), (torch.bfloat16, 50304, 50304), (torch.float16, 65, 128),
        (torch.bfloat16, 64, 64), (torch.float32, 50257, 50257),
    ):  # fmt: skip
        weight = torch.empty(vocab, 4, dtype=dtype, device="meta")
        assert loss_module.padded_vocab(weight) == wanted
    assert loss_module.padded_vocab(torch.empty(65, 4, dtype=torch.bfloat16)) == 65
    labels = torch.empty(32768, dtype=torch.int64, device="meta")
    sizes = [rows.stop - rows.start for rows in loss_module.row_chunks(labels, 50257)]
    assert sum(sizes) == 32768 and len(sizes) > 1
    assert not any(size % loss_module.GPU_ROWS for size in sizes)


def test_autocast_agrees_with_its_plain_twin() -> None:
    hidden, weight = torch.randn(2, 16, 32), 0.1 * torch.randn(100, 32)
    targets = torch.randint(0, 100, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(head_cross_entropy, hidden, weight, targets, 1.0)
    want = with_gradients(naive, hidden, weight, targets, 1.0)
    assert got[1].dtype == torch.float32 and got[2].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() / b.abs().max() <= 2e-2


def test_no_valid_target_gives_zero_not_nan() -> None:
    hidden, weight = torch.randn(1, 3, 4), torch.randn(5, 4)
    value, gh, gw = with_gradients(
        head_cross_entropy, hidden, weight, torch.full((1, 3), -100), 1.0
    )
    assert value == 0 and not gh.any() and not gw.any()


def test_a_retained_graph_can_be_backpropagated_again() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    value = head_cross_entropy(hidden, weight, torch.tensor([[1, 2, 3]]))
    first = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * value, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(2 * a, b)


def test_frozen_weight_gets_no_gradient_work() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    head_cross_entropy(hidden, torch.randn(5, 4), torch.tensor([[1, 2, 3]])).backward()
    assert hidden.grad is not None


_MEASURE = """
import sys, torch
from pathlib import Path
rows = int(sys.argv[1])
from app.models.transformer.layers.loss import (
    cross_entropy,
    cross_entropy_fused,
    head_cross_entropy,
)
torch.set_num_threads(2)
hidden = torch.randn(rows, 1024, 768, requires_grad=True)
weight = torch.randn(50304, 768, requires_grad=True)
targets = torch.randint(0, 50304, (rows, 1024))
(torch.randn(256, 768, requires_grad=True) @ torch.randn(768, 64)).sum().backward()
def peak_kib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak_kib()
head_cross_entropy(hidden, weight, targets).backward()
print((peak_kib() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_peak_memory_for_the_gpt2_vocabulary(rows: int) -> None:
    """rows x 1024 个词元、50,304 个词：前向加反向的额外峰值（含权重梯度）低于 300 MB。"""
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(rows)], capture_output=True, text=True, check=True
    )
    extra_mib = float(run.stdout)
    assert 50304 * 768 * 4 / 2**20 < extra_mib < 300e6 / 2**20, extra_mib

"""每个内核与它慢的孪生；一行就是一行。"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.quantization import kernels
from app.quantization.codes import Codes, pack
from app.quantization.kernels import (
    KERNELS,
    TWIN,
    Case,
    Kernel,
    choose_kernel,
    explain_kernels,
    relative_error,
    sample,
    why_not,
)
from app.quantization.native import TARGETS, load_native
from app.quantization.verify_kernels import verify_kernels

ROWS = (1, 2, 3, 4, 5, 8, 33, 64, 191, 200, 512)


def matrix(bits: int, outs: int, width: int, group: int = 32, asymmetric: bool = False) -> Codes:
    """满量程的码：int8 里连规范不写的 -128 也有。"""
    if bits == 16:
        return Codes(16, torch.randn(outs, width).half())
    if bits == 8:
        codes = torch.randint(-128, 128, (outs, width), dtype=torch.int8)
        codes[0], codes[-1] = 127, -128
        return Codes(8, codes, (torch.rand(outs, 1) + 0.5).bfloat16().half())
    nibbles = torch.randint(0, 16, (outs, width))
    nibbles[0], nibbles[-1] = 15, 0
    scale = (torch.rand(outs, width // group) + 0.5).bfloat16().half()
    minimum = -(torch.rand_like(scale) * 8).bfloat16().half() if asymmetric else None
    return Codes(4, pack(nibbles), scale, minimum, group)


def usable() -> list[tuple[Kernel, int]]:
    pairs = [(kernel, bits) for kernel in KERNELS for bits in kernel.tolerance]
    return [(k, bits) for k, bits in pairs if why_not(k, Case.of(sample(bits))) is None]


PAIRS = usable()
every = pytest.mark.parametrize(
    ("kernel", "bits"), PAIRS, ids=[f"{kernel.name}-{bits}" for kernel, bits in PAIRS]
)


def assert_rows_close(y: Tensor, exact: Tensor) -> None:
    error = (y - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() <= 1e-6


def needs_native() -> None:
    if load_native().handle is None:
        pytest.skip(f"the native file is absent: {load_native().reason}")


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """native.c 的每个编译目标；这台机器没有的跳过。"""
    monkeypatch.setenv("GPT2_NATIVE", request.param)
    needs_native()
    return request.param


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


@every
def test_equals_its_twin_for_few_and_many_rows(kernel: Kernel, bits: int) -> None:
    codes = matrix(bits, 48, 128)
    for rows in ROWS:
        x = torch.randn(rows, 128)
        x[-1] = 1.0  # 全与码同号：16 位里会饱和的就在这里饱和
        assert relative_error(kernel, codes, x) <= kernel.tolerance[bits], rows


@every
def test_bias_is_added(kernel: Kernel, bits: int) -> None:
    codes, x, bias = matrix(bits, 48, 128), torch.randn(4, 128), torch.randn(48)
    product = kernel.prepare(codes)
    assert torch.equal(product(x, bias), product(x, None) + bias)


@every
def test_a_row_does_not_change_with_its_batch(kernel: Kernel, bits: int) -> None:
    """一个大 20 倍的邻居在旁边也一样。"""
    codes, x = matrix(bits, 48, 128), torch.randn(200, 128)
    x[::3] *= 20
    product = kernel.prepare(codes)
    together = product(x, None)
    alone = torch.cat([product(row, None) for row in x.split(1)])
    if kernel.exact_rows:
        assert torch.equal(alone, together)
        assert torch.equal(product(x[5:7], None), together[5:7])
    assert_rows_close(alone, together)


@every
def test_a_row_of_nan_is_nan_and_the_others_are_not(kernel: Kernel, bits: int) -> None:
    codes, x = matrix(bits, 48, 128), torch.randn(4, 128)
    clean = kernel.prepare(codes)(x, None)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    y = kernel.prepare(codes)(x, None)
    assert not y[1:3].isfinite().any()
    assert_rows_close(y[[0, 3]], clean[[0, 3]])


@every
def test_rows_of_zeros_of_tiny_and_of_huge_numbers(kernel: Kernel, bits: int) -> None:
    codes, x = matrix(bits, 48, 128), torch.randn(5, 128)
    x[0] = 0.0
    x[1:2] *= 1e-20
    x[2:3] *= 1e20
    y = kernel.prepare(codes)(x, None)
    assert not y[0].any()
    exact = x.double() @ codes.dequantize().double().t()
    error = (y - exact).norm(dim=1)[1:] / exact.norm(dim=1)[1:]
    assert error.max() <= kernel.tolerance[bits]


@pytest.mark.parametrize("bits", (16, 8, 4))
@pytest.mark.parametrize(("outs", "width"), ((1, 32), (7, 64), (13, 96), (50, 1056), (261, 768)))
def test_native_odd_numbers_of_outputs(target: str, bits: int, outs: int, width: int) -> None:
    kernel, codes = KERNELS[0], matrix(bits, outs, width)
    x = torch.randn(7, width)
    exact = x.double() @ codes.dequantize().double().t()
    y = kernel.prepare(codes)(x, None)
    assert (y - exact).norm() <= kernel.tolerance[bits] * exact.norm()


@pytest.mark.parametrize("bits", (16, 8))
@pytest.mark.parametrize("width", (1, 3, 15, 17, 31, 63, 101))
def test_native_odd_widths(target: str, bits: int, width: int) -> None:
    kernel, codes = KERNELS[0], matrix(bits, 13, width)
    x = torch.randn(5, width)
    exact = x.double() @ codes.dequantize().double().t()
    y = kernel.prepare(codes)(x, None)
    assert (y - exact).norm() <= kernel.tolerance[bits] * exact.norm()


@pytest.mark.parametrize("group", (32, 64, 128))
@pytest.mark.parametrize("asymmetric", (False, True))
def test_native_groups_and_minima(target: str, group: int, asymmetric: bool) -> None:
    codes, x = matrix(4, 19, 384, group, asymmetric), torch.randn(5, 384)
    assert relative_error(KERNELS[0], codes, x) <= KERNELS[0].tolerance[4]


@pytest.mark.parametrize("width", (96, 101, 3072))
def test_native_int8_is_exact_integer_arithmetic(target: str, width: int) -> None:
    """逐位等于这十行整数的参考，所以各指令集也彼此相等。"""
    codes, x, bias = matrix(8, 21, width), torch.randn(9, width) * 3, torch.randn(21)
    assert torch.equal(KERNELS[0].prepare(codes)(x, bias), integers(codes, x) + bias)


def integers(codes: Codes, x: Tensor) -> Tensor:
    assert codes.scale is not None
    level = torch.tensor(min(32767.0, (2**31 - 1) // (128 * x.shape[1])))
    most = x.abs().amax(1, keepdim=True)
    q = (x * (level / most)).round().long()
    assert q.abs().max() == level
    sums = q @ codes.codes.long().t()
    assert sums.abs().max() < 2**31
    return sums.float() * (most / level * codes.scale.float().t())


@pytest.mark.parametrize("bits", (16, 8, 4))
def test_native_does_not_change_with_threads(target: str, bits: int, two_threads: None) -> None:
    codes, x = matrix(bits, 261, 96), torch.randn(200, 96)
    product = KERNELS[0].prepare(codes)
    two = product(x, None)
    torch.set_num_threads(1)
    assert torch.equal(product(x, None), two)


@pytest.mark.parametrize("bits", (16, 8, 4))
def test_native_reads_any_layout_of_x_and_leaves_it_alone(target: str, bits: int) -> None:
    codes, x = matrix(bits, 12, 64), torch.randn(64, 6)
    before = x.clone()
    product = KERNELS[0].prepare(codes)
    assert torch.equal(product(x.t(), None), product(x.t().contiguous(), None))
    assert torch.equal(x, before)
    assert product(x.t()[:0], None).shape == (0, 12)


def test_a_kernel_that_is_wrong_here_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(codes: Codes) -> kernels.Product:
        right = TWIN.prepare(codes)
        return lambda x, bias: right(x, bias) * 1.05

    def missing(codes: Codes) -> kernels.Product:
        return torch.ops.quantized.no_such_operator(codes)

    twice = Kernel("doubled", doubled, {8: 2e-2}, lambda case: None, lambda: "", True)
    bad = (twice, replace(twice, name="missing", prepare=missing))
    monkeypatch.setattr(kernels, "KERNELS", (*bad, TWIN))
    choice = choose_kernel(Case(8, 64, 64))
    assert choice.kernel is TWIN
    assert "not doubled: wrong on this machine: error 5.0e-02" in choice.reason
    assert "not missing: this torch cannot" in choice.reason


def test_the_choices_are_explained_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_NATIVE", "off")
    lines = explain_kernels([Case(16, 8, 8), Case(4, 8, 64, 32), Case(4, 8, 32, 32)])
    assert len(lines) == 2
    assert lines[0].startswith("16-bit: torch: ") and lines[0].endswith("(1 matrices)")
    assert "not native: GPT2_NATIVE=off" in lines[1] and lines[1].endswith("(2 matrices)")


def test_native_says_what_it_cannot_do() -> None:
    needs_native()
    reason = choose_kernel(Case(4, 64, 48, 16)).reason
    assert "not native: groups of 16 in width 48" in reason
    assert "not native: width 131072 > 65536" in choose_kernel(Case(8, 64, 2**17)).reason
    assert choose_kernel(Case(8, 64, 64, device="meta")).kernel is TWIN


def test_bits_that_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="no kernel for 3-bit weights: expected 16, 8 or 4"):
        choose_kernel(Case(3, 8, 8))


def test_verify_reports_every_kernel_and_fails_on_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    assert verify_kernels(lines.append)
    assert len(lines) == sum(len(kernel.tolerance) for kernel in KERNELS)
    strict = replace(TWIN, tolerance={8: 0.0})
    monkeypatch.setattr("app.quantization.verify_kernels.why_not", lambda kernel, case: None)
    monkeypatch.setattr("app.quantization.verify_kernels.KERNELS", (strict,))
    assert not verify_kernels(lines.append)
    assert "8-bit dequantize: FAIL: error" in lines[-1]


def test_avx2_saturation_never_reaches_a_user() -> None:
    """没有 VNNI 时 torch 的 int8 乘法会饱和：它必须被认出来，不用。"""
    code = (
        "from app.quantization.kernels import KERNELS, Case, why_not\n"
        "from app.quantization.verify_kernels import verify_kernels\n"
        "print(why_not(KERNELS[1], Case(8, 64, 64)))\n"
        "raise SystemExit(not verify_kernels(print))"
    )
    avx2 = {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "GPT2_NATIVE": "avx2" if "avx2" in _cpu_flags() else "generic",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | avx2, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8-bit native, chosen: ok" in done.stdout or load_native().handle is None
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert done.stdout.startswith("wrong on this machine"), done.stdout


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return info.read()
    except FileNotFoundError:
        return ""

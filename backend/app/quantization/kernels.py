"""内核的表：一种码在这台机器上由谁来乘，并说出英文的理由。

一种码只选一个内核，不看行数：换了内核就换了舍入，一行的结果便会随同批的行数而变。
每个内核第一次用之前先与慢的孪生比一次小而满量程的乘法，算错的（缺指令、会饱和、算子已被
删去）不用，并说出来。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from app.native.build import load_native

from .codes import Codes
from .products import Product, dequantized, guarded, native, packed_int4, widened


@dataclass(frozen=True)
class Case:
    """一个矩阵的静态事实；explain_kernels 不必有权重在手。"""

    bits: int
    outs: int
    width: int
    group: int = 0
    device: str = "cpu"

    @classmethod
    def of(cls, codes: Codes) -> Case:
        outs, width = codes.shape[-2:]
        return cls(codes.bits, outs, width, codes.group, codes.codes.device.type)


@dataclass(frozen=True, eq=False)
class Kernel:
    """表的一行。

    Attributes:
        refuses: 不接这种矩阵的理由；None = 接。
        tolerance: {位数: 与孪生的相对误差至多多少}；没有的位数不做。
        about: 用它时告诉用户的一句。
        exact_rows: 一行单独算与在批里算，逐位相同。
    """

    name: str
    prepare: Callable[[Codes], Product]
    tolerance: dict[int, float]
    refuses: Callable[[Case], str | None]
    about: Callable[[], str]
    exact_rows: bool


@dataclass(frozen=True)
class Choice:
    kernel: Kernel
    reason: str


def _native_refuses(case: Case) -> str | None:
    found = load_native()
    if found.handle is None:
        return found.reason
    if case.device != "cpu":
        return f"runs on a CPU, not on {case.device}"
    if case.bits == 4 and (case.group % 32 or case.width // case.group > _MAX_GROUPS):
        return f"groups of {case.group} in width {case.width}"
    if case.width > _MAX_WIDTH:
        return f"width {case.width} > {_MAX_WIDTH}"
    return None


def _on_cpu(case: Case) -> str | None:
    return None if case.device == "cpu" else f"runs on a CPU, not on {case.device}"


def _int4_refuses(case: Case) -> str | None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no faster than 16-bit weights without AVX-512"
    if case.group not in (32, 64, 128, 256) or case.outs % 16:
        return f"groups of {case.group}, {case.outs} outputs"
    return _on_cpu(case)


# product.c 里一行输出的尺度放在栈上；int8 的和要留在 int32 里，而取整的级数不该少于 255。
_MAX_GROUPS = 1024
_MAX_WIDTH = 2**16

TWIN = Kernel(
    "dequantize", dequantized, {16: 1e-5, 8: 1e-5, 4: 1e-5}, lambda case: None,
    lambda: "torch: dequantize, then multiply in float: slow", False,
)  # fmt: skip

# 由上到下，第一个接的就用。误差来自激活的取整（native 16 位、guard 8 位）与 bfloat16。
KERNELS = (
    Kernel(
        "native", native, {16: 1e-5, 8: 1e-3, 4: 1e-3}, _native_refuses,
        lambda: f"native: {load_native().reason}", True,
    ),
    Kernel(
        "int8", guarded, {8: 2e-2}, _on_cpu,
        lambda: "torch: int8 weights, activations rounded to 8 bits row by row", True,
    ),
    Kernel(
        "int4", packed_int4, {4: 1e-2}, _int4_refuses,
        lambda: "torch: int4 weights, bfloat16 activations", True,
    ),
    Kernel(
        "fp16", widened, {16: 1e-3, 8: 1e-3, 4: 1e-3}, _on_cpu,
        lambda: "torch: weights widened to 16 bits", False,
    ),
    TWIN,
)  # fmt: skip


def choose_kernel(case: Case) -> Choice:
    """第一个接这种矩阵、在这台机器上又算得对的内核；理由里有被跳过的那些为什么。"""
    passed: list[str] = []
    for kernel in KERNELS:
        if case.bits not in kernel.tolerance:
            continue
        why = why_not(kernel, case)
        if why is None:
            return Choice(kernel, "; ".join((kernel.about(), *passed)))
        passed.append(f"not {kernel.name}: {why}")
    raise ValueError(f"no kernel for {case.bits}-bit weights: expected 16, 8 or 4")


def why_not(kernel: Kernel, case: Case) -> str | None:
    """这个内核不接这种矩阵、或在这台机器上算错的理由；None = 能用。"""
    return kernel.refuses(case) or _fails(kernel, case.bits, case.device, load_native().reason)


def prepare(codes: Codes) -> Product:
    """这个矩阵在这台机器上的乘法。"""
    return choose_kernel(Case.of(codes)).kernel.prepare(codes)


def explain_kernels(cases: Iterable[Case]) -> list[str]:
    """每种不同的选择一行，给 plan、日志与 verify；不同形状同一个理由只说一次。"""
    lines: dict[str, int] = {}
    for case in cases:
        label = f"{case.bits}-bit" + (f" groups of {case.group}" if case.bits == 4 else "")
        line = f"{label}: {choose_kernel(case).reason}"
        lines[line] = lines.get(line, 0) + 1
    return [f"{line} ({count} matrices)" for line, count in lines.items()]


def relative_error(kernel: Kernel, codes: Codes, x: Tensor) -> float:
    """与孪生（float64）相差多少：各行 ‖差‖ / ‖孪生‖ 的最大值。有一个不是数就是无穷。"""
    exact = x.double() @ codes.dequantize().double().t()
    error = (kernel.prepare(codes)(x, None).double() - exact).norm(dim=1) / exact.norm(dim=1)
    return float(error.nan_to_num(nan=torch.inf).max())


def sample(bits: int, outs: int = 48, width: int = 128, device: str = "cpu") -> Codes:
    """满量程的码，每次相同：第一个输出全是最大的码，第二个全是最小的。"""
    random = torch.Generator().manual_seed(bits)

    def scales(columns: int) -> Tensor:
        return (torch.rand(outs, columns, generator=random) + 0.5).bfloat16().half().to(device)

    if bits == 16:
        return Codes(16, torch.randn(outs, width, generator=random).half().to(device))
    low, high, dtype, columns = (
        (-127, 128, torch.int8, width) if bits == 8 else (0, 256, torch.uint8, width // 2)
    )
    codes = torch.randint(low, high, (outs, columns), generator=random, dtype=dtype)
    codes[0], codes[1] = high - 1, low
    group = 32 if bits == 4 else 0
    return Codes(bits, codes.to(device), scales(width // group if group else 1), None, group)


@cache
def _fails(kernel: Kernel, bits: int, device: str, native_reason: str) -> str | None:
    """小而满量程的乘法算得不对的理由。饱和只在激活与码都同号又很大时发生，所以有全 1 的行。"""
    if kernel is TWIN:
        return None
    codes = sample(bits, device=device)
    x = torch.randn(5, codes.shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    x[0], x[1] = 1.0, -1.0
    x[2] *= 20
    try:
        error = relative_error(kernel, codes, x)
    except (RuntimeError, AttributeError, NotImplementedError) as missing:
        return f"this torch cannot: {str(missing).splitlines()[0][:120]}"
    limit = kernel.tolerance[bits]
    return None if error <= limit else f"wrong on this machine: error {error:.1e} > {limit:.0e}"

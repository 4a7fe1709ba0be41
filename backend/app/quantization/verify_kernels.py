"""`gpt2 verify --quantized`：这台机器有的每个内核，与慢的孪生比，并计时。"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .kernels import KERNELS, Case, Kernel, choose_kernel, relative_error, sample, why_not

# 一行、几行、许多行；最后一行比别的大得多，坏的尺度就藏不住。
_ROWS = (1, 3, 64)
_SIZE = (768, 768)


def verify_kernels(tell: Callable[[str], object], device: str = "cpu") -> bool:
    """逐个报告误差、一行单独算与成批算是否逐位相同、各行数的毫秒；有一个不对就是 False。"""
    fine = True
    for bits in (16, 8, 4):
        codes = sample(bits, *_SIZE, device=device)
        case = Case.of(codes)
        chosen = choose_kernel(case).kernel
        for kernel in KERNELS:
            if bits not in kernel.tolerance:
                continue
            reason = why_not(kernel, case)
            if reason is not None:
                tell(f"{bits}-bit {kernel.name}: not used: {reason}")
                continue
            passed, text = _report(kernel, bits, device)
            used = ", chosen" if kernel is chosen else ""
            tell(f"{bits}-bit {kernel.name}{used}: {'ok' if passed else 'FAIL'}: {text}")
            fine = fine and passed
    return fine


def _report(kernel: Kernel, bits: int, device: str) -> tuple[bool, str]:
    codes = sample(bits, *_SIZE, device=device)
    x = torch.randn(_ROWS[-1], _SIZE[1], generator=torch.Generator().manual_seed(1)).to(device)
    x[-1] *= 20
    limit, error = kernel.tolerance[bits], relative_error(kernel, codes, x)
    product = kernel.prepare(codes)
    together = product(x, None)
    alone = torch.cat([product(row, None) for row in x.split(1)])
    equal = torch.equal(alone, together)
    times = []
    for rows in _ROWS:
        start = time.perf_counter()
        product(x[:rows], None)
        times.append(f"{rows}: {(time.perf_counter() - start) * 1e3:.2f} ms")
    row = "a row alone equals it in a batch" if equal else "a row alone differs by rounding"
    passed = error <= limit and (equal or not kernel.exact_rows)
    return passed, f"error {error:.1e} (at most {limit:.0e}), {row}, rows {', '.join(times)}"

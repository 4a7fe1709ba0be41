"""GPT-2 Small 的全部 49 个乘法，各位数、各内核、各行数：毫秒与读权重的 GB/s，旁边是内存的下限。

cd backend && python -m benchmarks.quant_kernels
一个内核要与 AVX2 的比，就在外面设 GPT2_NATIVE=avx2 ATEN_CPU_CAPABILITY=avx2
FBGEMM_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2。
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from app.models.transformer.layers.linear import linear
from app.native.build import load_native
from app.native.structs import Held, float_weight
from app.quantization.codes import Codes
from app.quantization.kernels import KERNELS, Case, sample, why_not

from .common import hardware, interleaved, read_bandwidth, table, write_result

Product = Callable[[Tensor], Tensor]
WIDTH, LAYERS, VOCAB = 768, 12, 50257
BLOCK = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
SHAPES = BLOCK * LAYERS + ((VOCAB, WIDTH),)
FORMATS = {"fp16": (16, 16), "int8": (8, 8), "int4 g32, int8 head": (4, 8)}


def matrices(bits: int, head_bits: int) -> list[Codes]:
    return [sample(head_bits if outs == VOCAB else bits, outs, width) for outs, width in SHAPES]


def job(products: list[Product], rows: int) -> Callable[[], object]:
    inputs = {width: torch.randn(rows, width) for _, width in SHAPES}

    def run() -> None:
        for (_, width), product in zip(SHAPES, products, strict=True):
            product(inputs[width])

    return run


def float_products() -> dict[str, list[Product]]:
    """torch 的，与有原生的文件时它的（解码的一步用它，到 MOST_ROWS 行为止）。"""
    weights = [torch.randn(shape) for shape in SHAPES]
    found: dict[str, list[Product]] = {
        "float32, torch": [lambda x, w=w: linear(x, w) for w in weights]
    }
    handle = load_native().handle
    if handle is not None:
        call = handle.gpt2_product

        def native(held: Held, outs: int) -> Product:
            def product(x: Tensor) -> Tensor:
                y = x.new_empty(len(x), outs)
                threads = torch.get_num_threads()
                call(held.address, x.data_ptr(), len(x), None, y.data_ptr(), threads)
                return y

            return product

        found["float32, native"] = [native(float_weight(w), len(w)) for w in weights]
    return found


def quantized_products() -> dict[str, tuple[list[Product], int]]:
    """{名字: (49 个乘法, 权重的字节数)}，每种格式能用的每个内核。"""
    found: dict[str, tuple[list[Product], int]] = {}
    for label, bits in FORMATS.items():
        codes = matrices(*bits)
        size = sum(t.numel() * t.element_size() for c in codes for t in c.tensors().values())
        for kernel in KERNELS:
            cases = {Case.of(c): c for c in codes}
            if any(c.bits not in kernel.tolerance or why_not(kernel, c) for c in cases):
                continue
            ready = [kernel.prepare(c) for c in codes]
            found[f"{label}, {kernel.name}"] = [lambda x, p=p: p(x, None) for p in ready], size
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, do not write results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    size = sum(outs * width for outs, width in SHAPES) * 4
    ways = {name: (each, size) for name, each in float_products().items()} | quantized_products()
    times: dict[int, dict[str, float]] = {}
    for rows in args.rows:
        jobs = {name: job(products, rows) for name, (products, _) in ways.items()}
        times[rows] = interleaved(jobs, args.rounds if rows < 64 else max(2, args.rounds // 4))
    lines = [
        [
            name, f"{size / 1e6:.0f}", f"{size / bandwidth * 1e3:.2f}",
            *(f"{times[rows][name] * 1e3:.2f}" for rows in args.rows),
            f"{size / times[args.rows[0]][name] / 1e9:.1f}",
        ]
        for name, (_, size) in ways.items()
    ]  # fmt: skip
    header = ["weights, kernel", "MB", "floor ms", *(f"{r} rows, ms" for r in args.rows)]
    body = table([*header, f"GB/s at {args.rows[0]}"], lines)
    body += f"\n\nMemory read at {bandwidth / 1e9:.1f} GB/s (the floor)."
    if args.dry:
        print(hardware(), body, sep="\n\n")
    else:
        write_result("quant_kernels", "python -m benchmarks.quant_kernels", body)


if __name__ == "__main__":
    main()

"""在这台机器上怎样跑：设备、精度、编译；每个选择都带一句理由，失败就退一步并说明。"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from app.common.tell import Tell
from app.distributed.comm import ALONE, Ranks
from app.models.transformer.layers.loss import cross_entropy, cross_entropy_fused
from app.models.transformer.model import GPT2Model
from app.models.transformer.weights.own_folder import expected_shapes

from ..config import TrainConfig


@dataclass(frozen=True)
class Runtime:
    """已定下的设备与精度，各附理由。

    Attributes:
        products: GPU 上 float32 的乘法怎样算；别处 None。
    """

    device: torch.device
    device_why: str
    dtype: torch.dtype
    dtype_why: str
    products: tuple[str, str] | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """权重始终是 float32；bfloat16 只用于矩阵乘法。"""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_runtime(config: TrainConfig) -> Runtime:
    """
    Raises:
        ValueError: 点名要的设备不存在。
    """
    device, device_why = _device(config.device)
    dtype, dtype_why = _dtype(config.precision, device)
    return Runtime(device, device_why, dtype, dtype_why, _products(device))


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"
    return open_device(name), "asked for"


def open_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: 没有这个设备。
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device={name!r} cannot be used: {reason}; try device=cpu") from None
    return device


def _dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    if precision == "float32":
        return torch.float32, "asked for"
    native, why = _native_bfloat16(device)
    if precision == "bfloat16":
        return torch.bfloat16, "asked for" if native else f"asked for, though {why}: slow"
    return (torch.bfloat16 if native else torch.float32), why


def _native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """硬件自己算 bfloat16 才划算；软件模拟只会更慢。"""
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return (
            major >= 8,
            f"compute capability {major}.x {'has' if major >= 8 else 'lacks'} bfloat16",
        )
    if device.type == "cpu":
        has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return has, f"this CPU {'has' if has else 'has no'} AMX or AVX512-BF16 instructions"
    return False, f"bfloat16 on {device.type} is not measured here"


def _products(device: torch.device) -> tuple[str, str] | None:
    """定下 GPU 上 float32 的乘法怎样算：(做法, 理由)；别的设备不动，None。

    容器会用环境变量打开 TF32（10 位尾数，比 bfloat16 只多 3 位），要了 float32 的人并不知道；
    要快的已经在用 bfloat16，剩下的（路由器、被点名的 float32）就是要准。
    """
    if device.type != "cuda":
        return None
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    found = torch.get_float32_matmul_precision()
    if found != "highest" or torch.backends.cuda.matmul.allow_tf32:
        return found, "TF32 is forced on by the environment: float32 products have 10 bits"
    return "IEEE float32", "TF32 is off; bfloat16 is the fast way"


def compile_blocks(
    model: GPT2Model,
    mode: str,
    device: torch.device,
    probe: Callable[[], object],
    tell: Tell,
    ranks: Ranks = ALONE,
) -> str:
    """就地编译每个块（权重名不变，没有 `_orig_mod.`），试跑一步，失败则退回。

    各 rank 同进退：有的编译、有的不，几个 rank 就不再是一个 rank 的位。

    GPU 上另编译损失的一块：不融合时 (R, V) 的 logits 读写十来遍，与各块的全部乘法一样久。
    probe 跑一次前向与反向；它不得留下梯度，随机数状态由这里复原。
    """
    blocks = list(model.h.values())
    reason = _first(ranks.collect(_why_not(mode, device)))
    if reason:
        return f"off: {reason}"
    for block in blocks:
        block.compile()
    on_card = device.type == "cuda"
    if on_card:
        fused = torch.compile(cross_entropy_fused)
        model.loss_chunk = lambda logits, labels, rows: fused(logits, labels)
    devices = [device] if on_card else []
    failed = None
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            # float32 的乘法怎样算是定好并说过的（_products），编译器不必再劝。
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            probe()
    # 编译器的失败种类繁多且随版本变；任何一种都退回，真错误会在随后的训练里照样抛出。
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        failed = f"{type(error).__name__}: {first}"
    failed = _first(ranks.collect(failed))
    if failed is not None:
        for block in blocks:
            block._compiled_call_impl = None
        model.loss_chunk = cross_entropy
        torch.compiler.reset()
        tell(f"compile failed, going on without: {failed}")
        return "off: compiling failed"
    return "on: per block, and the loss" if on_card else "on: per block"


def _first(said: Sequence[str | None]) -> str | None:
    """各 rank 说的里，第一个有话的。"""
    return next((one for one in said if one is not None), None)


def _why_not(mode: str, device: torch.device) -> str | None:
    if mode == "off":
        return "asked for"
    if device.type == "cpu":
        if mode == "auto":
            return "on a CPU compiling takes longer than it saves in a short run (--compile on)"
        compiler = os.environ.get("CXX") or "g++"
        if not (shutil.which(compiler) or shutil.which("clang++") or shutil.which("cl")):
            return "no C++ compiler found (install g++)"
        return None
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    return f"not used on {device.type}" if mode == "auto" else None


@contextlib.contextmanager
def memory_error(config: TrainConfig, rows: int) -> Iterator[None]:
    """内存不够时说清尺寸与改法；rows：一次前向的序列数，0 = 还在建模型。

    Raises:
        MemoryError: 代替各设备、各个库各样的（有的一个字也没有的）报错。
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise MemoryError(_memory_advice(config, rows)) from error


def _is_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("out of memory", "can't allocate memory", "bad_alloc"))


def _memory_advice(config: TrainConfig, rows: int) -> str:
    shape = config.model
    parameters = sum(map(math.prod, expected_shapes(GPT2Model, shape).values()))
    # 权重、梯度与两个矩，都是 float32。
    held = f"{parameters:,} parameters ({16 * parameters / 1e6:,.0f} MB with gradients and AdamW)"
    if rows > 1:
        return (
            f"out of memory with {rows} sequences of {shape.context_size} tokens at once and "
            f"{held}: use --micro-batch {rows // 2} (the result stays the same)"
        )
    when = f"with one sequence of {shape.context_size} tokens at once and"
    recompute = "--activation-checkpointing 1 (slower, the same result), or "
    if not rows or config.activation_checkpointing == 1:
        recompute = ""
    return (
        f"out of memory {when if rows else 'for a model of'} {held}: use {recompute}a smaller "
        f"--model.n-layer "
        f"(now {shape.n_layer}), --model.n-embed (now {shape.n_embed}) or --model.context-size; "
        "`gpt2 plan` says what fits"
    )

"""在这台机器上怎样跑：设备、精度、编译；每个选择都带一句理由，失败就退一步并说明。"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from app.common.tell import Tell
from app.models.transformer.model import GPT2Model
from app.models.transformer.weights.own_folder import expected_shapes

from ..config import TrainConfig


@dataclass(frozen=True)
class Runtime:
    """已定下的设备与精度，各附理由。"""

    device: torch.device
    device_why: str
    dtype: torch.dtype
    dtype_why: str

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
    return Runtime(device, device_why, dtype, dtype_why)


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


def compile_blocks(
    blocks: Iterable[nn.Module],
    mode: str,
    device: torch.device,
    probe: Callable[[], object],
    tell: Tell,
) -> str:
    """就地编译每个块（权重名不变，没有 `_orig_mod.`），试跑一步，失败则退回。

    probe 跑一次前向与反向；它不得留下梯度，随机数状态由这里复原。
    """
    blocks = list(blocks)
    reason = _why_not(mode, device)
    if reason:
        return f"off: {reason}"
    for block in blocks:
        block.compile()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            probe()
    # 编译器的失败种类繁多且随版本变；任何一种都退回，真错误会在随后的训练里照样抛出。
    except Exception as error:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()
        first = str(error).strip().split("\n")[0][:200]
        tell(f"compile failed, going on without: {type(error).__name__}: {first}")
        return "off: compiling failed"
    return "on: per block"


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
    return (
        f"out of memory {when if rows else 'for a model of'} {held}: use a smaller --model.n-layer "
        f"(now {shape.n_layer}), --model.n-embed (now {shape.n_embed}) or --model.context-size; "
        "`gpt2 plan` says what fits"
    )

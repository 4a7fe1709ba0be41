"""FlexAttention（Dong et al. 2024, arXiv:2412.05496）：把图样与坐标译成 mask_mod 与 BlockMask。

mask_mod 与 masking.visible 是同一个谓词；BlockMask 只有块的表，从不经过 T×T 的张量。
自己用 FlexAttention 的人只需要 pattern_mask_mod 与 pattern_block_mask。

B 批、H 查询头数、G 键值头数、Tq/Tk 查询/键数、D 头宽；nq/nk 查询/键的块数、S 块长。
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..visibility.pattern import Pattern
from ..visibility.positions import PADDING, Positions
from ..visibility.rule import visible

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# CPU 上块小则在部分可见的块里白算的少；GPU 的核按 128 调过，也是 torch 的默认值。
_CPU_BLOCK, _BLOCK = 64, 128
# 求块掩码时一次展开多少个 (q, k) 对：内存的上限，与 T、B 无关。
_PAIRS_AT_ONCE = 1 << 21
# 小于、大于一切位置，用作空块的界。
_LOW, _HIGH = -(1 << 62), 1 << 62


def pattern_mask_mod(pattern: Pattern) -> MaskMod:
    """普通位置（位置 = 下标）的 mask_mod，可直接交给 create_block_mask 与 flex_attention。"""

    def allowed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen: Tensor = pattern.allow(q_idx, kv_idx) & (kv_idx <= q_idx)
        return seen

    return allowed


def pattern_block_mask(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    *,
    block_size: int = _BLOCK,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """普通位置（查询与键都从 0 起）的 BlockMask；同样的参数只算一次。

    与 create_block_mask(pattern_mask_mod(pattern), ...) 逐块相等，但不造 T×T 的张量。
    """
    if min(q_len, kv_len, block_size) < 1:
        raise ValueError(
            f"q_len={q_len}, kv_len={kv_len}, block_size={block_size}: each must be at least 1"
        )
    return _plain_block_mask(pattern, q_len, kv_len, block_size, torch.device(device))


def _plain(pattern: Pattern, q: Positions, k: Positions) -> bool:
    """位置就是下标，图样之外没有别的限制。"""
    return q.start == 0 and k.start == 0 and _marks(pattern, q, k) is None


def _marks(pattern: Pattern, q: Positions, k: Positions) -> tuple[Tensor, Tensor] | None:
    if not pattern.takes_marks or q.marked is None or k.marked is None:
        return None
    return q.marked, k.marked


def mask_mod(pattern: Pattern, q: Positions, k: Positions) -> MaskMod:
    """与 visible(q, k, pattern) 相同的谓词，按 (b, h, q_idx, kv_idx) 逐点求值；与头无关。"""
    if _plain(pattern, q, k):
        # 不捕获张量：核里少读两次内存，也不因坐标换了张量而重新检查。
        return pattern_mask_mod(pattern)
    q_pos, k_pos = q.pos, k.pos
    segments = None if q.segment is None or k.segment is None else (q.segment, k.segment)
    marks = _marks(pattern, q, k)

    def allowed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_at, k_at = _at(q_pos, b, q_idx), _at(k_pos, b, kv_idx)
        marked: Tensor | bool = False
        if marks is not None:
            marked = _at(marks[0], b, q_idx) | _at(marks[1], b, kv_idx)
        seen: Tensor = pattern.allow(q_at, k_at, marked) & (k_at <= q_at) & (k_at >= 0)
        if segments is not None:
            seen = seen & (_at(segments[0], b, q_idx) == _at(segments[1], b, kv_idx))
        return seen

    return allowed


def _at(x: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """(B|1, T) 的一个元素；各行相同时不看 b。"""
    return x[0, index] if len(x) == 1 else x[b, index]


def block_mask(pattern: Pattern, q: Positions, k: Positions, block_size: int = _BLOCK) -> BlockMask:
    """精确的 BlockMask（分出部分可见与全部可见的块），不经过 (Tq, Tk) 的张量。

    先由每块坐标的上下界排除看不见的块，只对余下的块逐对求值：有界的图样因此与 T 成线性。
    普通位置的结果有缓存；其余的，同一对 q、k 对象只算一次（各层共用一个 MaskPlan）。
    """
    if _plain(pattern, q, k):
        return _plain_block_mask(pattern, q.length, k.length, block_size, q.pos.device)
    return _same_positions(_Identity(q), _Identity(k), pattern, block_size)


class _Identity:
    """按身份比较的键。强引用保证缓存期间 id 不会被别的对象占用。"""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.positions is other.positions

    def __hash__(self) -> int:
        return id(self.positions)


@functools.lru_cache(maxsize=4)
def _same_positions(q: _Identity, k: _Identity, pattern: Pattern, block_size: int) -> BlockMask:
    return _build(pattern, q.positions, k.positions, block_size)


@functools.lru_cache(maxsize=32)
def _plain_block_mask(
    pattern: Pattern, q_len: int, kv_len: int, block_size: int, device: torch.device
) -> BlockMask:
    # 推理模式里造的张量不能为反向保存，而缓存会把它带进训练。
    with torch.inference_mode(False):
        q, k = (Positions.plain(0, length, device) for length in (q_len, kv_len))
        return _build(pattern, q, k, block_size)


@torch.compiler.disable
def _build(pattern: Pattern, q: Positions, k: Positions, size: int) -> BlockMask:
    q_blocks, k_blocks = _blocks(q, size), _blocks(k, size)
    candidates = _reachable(pattern, q_blocks, k_blocks)
    kinds = candidates.new_zeros((2, *candidates.shape))
    for rows, i, j in zip(
        *(
            index.split(max(1, _PAIRS_AT_ONCE // size**2))
            for index in candidates.nonzero(as_tuple=True)
        ),
        strict=True,
    ):
        seen = visible(_pick(q_blocks, rows, i), _pick(k_blocks, rows, j), pattern)
        some, every = seen.flatten(1).any(1), seen.flatten(1).all(1)
        kinds[0, rows, i, j] = some & ~every
        kinds[1, rows, i, j] = every
    (partial_count, partial), (full_count, full) = (_ordered(kind[:, None]) for kind in kinds)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial,
        full_count,
        full,
        BLOCK_SIZE=size,
        mask_mod=mask_mod(pattern, q, k),
        seq_lengths=(q.length, k.length),
    )


def _ordered(kind: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, nq, nk) bool -> 每行的块数与块号，选中的在前、次序不变：BlockMask 的存法。"""
    order = kind.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kind.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _blocks(where: Positions, size: int) -> Positions:
    """各坐标切成块：(B|1, n, S)，末块的空位是填充。"""

    def cut(x: Tensor, filler: int) -> Tensor:
        return F.pad(x, (0, -where.length % size), value=filler).unflatten(1, (-1, size))

    return Positions(
        cut(where.pos, PADDING),
        None if where.segment is None else cut(where.segment, 0),
        marked=None if where.marked is None else cut(where.marked, False),
    )


def _pick(blocks: Positions, rows: Tensor, index: Tensor) -> Positions:
    """第 rows 行的第 index 块，块当作批：(候选数, S)。"""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows if len(x) > 1 else 0, index]

    pos = pick(blocks.pos)
    assert pos is not None
    return Positions(pos, pick(blocks.segment), marked=pick(blocks.marked))


def _reachable(pattern: Pattern, q: Positions, k: Positions) -> Tensor:
    """(B|1, nq, nk) bool：看得见的块的一个超集，只看每块坐标的界。"""
    q_low, q_high = _bounds(q.pos, q.pos >= 0)
    k_low, k_high = _bounds(k.pos, k.pos >= 0)
    q_low, q_high, k_low, k_high = (
        q_low[:, :, None],
        q_high[:, :, None],
        k_low[:, None],
        k_high[:, None],
    )
    near = k_low <= q_high
    if pattern.reach is not None:
        close = (q_low - pattern.reach < k_high) | (k_low < pattern.pinned)
        marks = _marks(pattern, q, k)
        if marks is not None:
            # 点名的词元不受窗口约束。
            close = close | marks[0].any(-1)[:, :, None] | marks[1].any(-1)[:, None]
        near = near & close
    if q.segment is not None and k.segment is not None:
        q_first, q_last = _bounds(q.segment, q.pos >= 0)
        k_first, k_last = _bounds(k.segment, k.pos >= 0)
        near = near & (k_first[:, None] <= q_last[:, :, None])
        near = near & (q_first[:, :, None] <= k_last[:, None])
    return near


def _bounds(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(B|1, n, S) -> 每块真词元的最小与最大值；整块是填充时界是空的（最小大于最大）。"""
    return x.masked_fill(~real, _HIGH).amin(-1), x.masked_fill(~real, _LOW).amax(-1)


def blocks_of(pattern: Pattern, q: Positions, k: Positions) -> BlockMask:
    """这个设备上的块长的 block_mask。"""
    return block_mask(pattern, q, k, _CPU_BLOCK if q.pos.is_cpu else _BLOCK)


class Plan(Protocol):
    """attend_flex 要的两样；blocks 在编译过的块之外备好：在里面每层每步都要重算，还要等设备。"""

    @property
    def pattern(self) -> Pattern: ...
    @property
    def blocks(self) -> BlockMask | None: ...


def attend_flex(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float = 0.0) -> Tensor:
    """q (B, H, Tq, D)、k/v (B, G, Tk, D) -> (B, H, Tq, D)。看不见任何键的行为 0。

    只用编译过的核：未编译的 flex_attention 会悄悄造出 T×T 的分数。每种形状、图样编译一次，
    首次调用因此要等几秒到十几秒。

    Raises:
        ValueError: why_not 给出的理由，或编译过的形状与图样多过 torch 的上限。
    """
    assert plan.blocks is not None
    if _inside(q):
        joined: Tensor = flex_attention(
            q, k, v, block_mask=plan.blocks, enable_gqa=q.shape[1] != k.shape[1]
        )
        return joined
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    reason = why_not(
        q.device, q.dtype, grad=grad, dropout=dropout, q_len=q.shape[2], head_dim=q.shape[3]
    )
    if reason is not None:
        raise ValueError(f"attention_backend='flex': {reason}")
    on_cpu = q.device.type == "cpu"
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        y = _compiled(on_cpu)(q, k, v, block_mask=plan.blocks, enable_gqa=q.shape[1] != k.shape[1])
    except FailOnRecompileLimitHit:
        raise ValueError(
            f"attention_backend='flex': too many shapes or patterns compiled in this process "
            f"(the last: {q.shape[2]} queries, {k.shape[2]} keys, {plan.pattern}): pad inputs to "
            "fewer lengths, or use attention_backend='sdpa'"
        ) from None
    assert isinstance(y, Tensor)
    return y


def _inside(q: Tensor) -> bool:
    """正在编译的块里：随块一起编译，不断图；能不能做，选后端时已经查过。

    CPU 上不行：块的形状会转为动态，见 _compiled。
    """
    return torch.compiler.is_compiling() and not q.is_cpu


@functools.cache
def _compiled(on_cpu: bool) -> Callable[..., Any]:
    """fullgraph：到了重编译的上限就报错，而不是退回未编译的 T×T 实现。

    CPU 上只能用静态形状：torch 2.13 的代码生成按前缀替换变量名，动态形状遇到捕获的张量或
    标量的遮蔽时产出编译不过的 C++。GPU 上留给 torch 自己决定何时转为动态。
    """
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if on_cpu else None)


def why_not(
    device: torch.device,
    dtype: torch.dtype,
    *,
    grad: bool,
    dropout: float,
    q_len: int,
    head_dim: int,
) -> str | None:
    """FlexAttention 做不了这件事的英文理由；None = 做得了。

    CPU 的各条在 torch 2.13 上跑过；CUDA 的各条来自 torch 的文档与源码，没有在 GPU 上跑过。
    """
    if dropout > 0:
        return f"dropout={dropout} but FlexAttention has no dropout: use dropout=0.0 or 'sdpa'"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not supported, the kernel computes in float32: use 'reference'"
    if q_len == 1:
        # CPU 的解码核在查询看不见任何键时读未初始化的内存；每个缓存长度还要各编译一次。
        return "one query at a time (decoding) gains nothing from a block mask: use 'sdpa'"
    if device.type == "cpu":
        return _why_not_cpu(grad)
    if device.type == "cuda":
        return _why_not_cuda(device, head_dim)
    return f"device {device.type} is not supported, only cpu and cuda are: use 'sdpa'"


def _why_not_cpu(grad: bool) -> str | None:
    if grad:
        return "FlexAttention has no backward on the CPU: use 'blocked' or 'sdpa' to train"
    capability = torch.backends.cpu.get_cpu_capability()
    if sys.platform == "darwin" or not capability.startswith("AVX"):
        return f"the CPU kernel needs AVX2 on Linux or Windows, not {capability} on {sys.platform}"
    return _no_compiler()


@functools.cache
def _no_compiler() -> str | None:
    """编译器缺了什么；没有就说找过哪些名字，而不是让用户看编译失败的堆栈。"""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
        looked = ", ".join(str(name) for name in names if name)
        return f"no C++ compiler found (looked for {looked}): install one, or set CXX to it"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"compiling needs the Python headers, {header} is absent: install them"
    return None


def _why_not_cuda(device: torch.device, head_dim: int) -> str | None:
    if find_spec("triton") is None:
        return "compiling for the GPU needs triton, which is not installed: pip install triton"
    if head_dim < 16:
        return f"head_dim={head_dim} but the GPU kernel needs at least 16: use 'sdpa'"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"the GPU has compute capability {major}.{minor}, triton needs 7.0: use 'sdpa'"
    return None

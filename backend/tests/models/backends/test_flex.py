"""FlexAttention：谓词、块掩码、编译出来的核，都与 masking.visible 比；做不了的事说出理由。"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.models.transformer.backends import flex
from app.models.transformer.backends.flex import (
    attend_flex,
    block_mask,
    blocks_of,
    mask_mod,
    pattern_block_mask,
    pattern_mask_mod,
    why_not,
)
from app.models.transformer.visibility.atoms import Fixed, Global, Local, Longformer, Sinks, Strided
from app.models.transformer.visibility.pattern import CAUSAL, Pattern
from app.models.transformer.visibility.positions import Positions
from app.models.transformer.visibility.rule import visible

from ..helpers import tiny_model, tokens

CPU = torch.device("cpu")
PATTERNS: tuple[Pattern, ...] = (
    CAUSAL,
    Local(7),
    Local(18),
    Local(5, 3),
    Strided(6),
    Fixed(12, 2),
    Global(3),
    Longformer(9, 2),
    Longformer(4, 0, 2),
    Sinks(2, 11),
    Local(6) | Strided(8),
    Strided(4) & Local(30),
    (Local(20) | Global(5)) & Strided(2),
)


class Plan(NamedTuple):
    q: Positions
    k: Positions
    pattern: Pattern

    @property
    def blocks(self) -> BlockMask:
        return blocks_of(self.pattern, self.q, self.k)


@st.composite
def coordinates(draw: st.DrawFn) -> tuple[Positions, Positions]:
    """普通、接着缓存、左右填充、打包、点名、乱序的位置。"""
    kind = draw(st.sampled_from(["plain", "later", "padded", "packed", "marked", "shuffled"]))
    length, rows = draw(st.integers(1, 70)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    start = draw(st.integers(0, 40)) if kind == "later" else 0
    if kind in ("plain", "later"):
        k_len = draw(st.integers(1, 70)) if kind == "plain" else start + length
        return Positions.plain(start, length, CPU), Positions.plain(0, k_len, CPU)
    if kind == "shuffled":
        q = torch.randint(-1, 60, (rows, length), generator=generator)
        k = torch.randint(-1, 60, (rows, draw(st.integers(1, 70))), generator=generator)
        return Positions(q), Positions(k)
    if kind == "packed":
        segment = torch.randint(0, 2, (rows, length), generator=generator).cumsum(1) // 8
        mask = torch.ones(rows, length)
        mask[:, length - draw(st.integers(0, length)) :] = 0
        where = Positions.packed(segment, mask)
        return where, where
    if kind == "padded":
        mask = torch.ones(rows, length)
        mask[0, : draw(st.integers(0, length))] = 0
        where = Positions.padded(mask)
        return where, where
    where = Positions.plain(0, length, CPU)
    chosen = torch.rand(rows, length, generator=generator) < 0.1
    where = Positions(where.pos, start=0, marked=chosen, dense=True)
    return where, where


def expanded(mask: BlockMask, truth: Tensor) -> Tensor:
    """块掩码所说的逐点可见性：全部可见的块不问谓词，部分可见的块问 truth，其余看不见。"""
    size = mask.BLOCK_SIZE[0]

    def spread(count: Tensor | None, index: Tensor | None) -> Tensor:
        assert count is not None and index is not None
        chosen = torch.zeros(index.shape, dtype=torch.bool)
        wanted = torch.arange(index.shape[-1]) < count[..., None]
        chosen.scatter_(-1, index.long(), wanted)
        return chosen.repeat_interleave(size, -2).repeat_interleave(size, -1)[:, 0]

    t_q, t_k = truth.shape[-2:]
    partial = spread(mask.kv_num_blocks, mask.kv_indices)[:, :t_q, :t_k]
    full = spread(mask.full_kv_num_blocks, mask.full_kv_indices)[:, :t_q, :t_k]
    assert not (partial & full).any()
    return full | (partial & truth)


@given(coordinates(), st.sampled_from(PATTERNS), st.sampled_from([4, 16]))
def test_the_block_mask_and_the_predicate_are_the_dense_mask(
    where: tuple[Positions, Positions], pattern: Pattern, size: int
) -> None:
    q, k = where
    truth = visible(q, k, pattern)
    rows = len(truth)
    # create_mask 与核一样，用标量下标逐点求值。
    said = create_mask(mask_mod(pattern, q, k), rows, None, q.length, k.length, "cpu")
    assert torch.equal(said[:, 0], truth)
    mask = block_mask(pattern, q, k, size)
    assert mask.shape == (rows, 1, q.length, k.length)
    assert torch.equal(expanded(mask, truth), truth)
    # 与 torch 自己的（经过 T×T 的）逐块相等：没有多出一块，也没有把全部可见的当成部分可见。
    theirs = create_block_mask(
        mask_mod(pattern, q, k), rows, None, q.length, k.length, "cpu", BLOCK_SIZE=size
    )
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(theirs, name)), name


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_block_within_reach_is_left_out(pattern: Pattern, size: int) -> None:
    """每个图样都走到，窗口的边恰在块边上的也在内（local(18)）。"""
    where = Positions.plain(0, 70, CPU)
    truth = visible(where, where, pattern)
    assert torch.equal(expanded(block_mask(pattern, where, where, size), truth), truth)


def test_many_pairs_are_evaluated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Positions.plain(0, 100, CPU)
    whole = flex._build(CAUSAL, where, where, 8)
    monkeypatch.setattr(flex, "_PAIRS_AT_ONCE", 3 * 8 * 8)
    pieces = flex._build(CAUSAL, where, where, 8)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))


class Sizes(TorchDispatchMode):
    """造出的最大与全部的元素数；视图也算，所以是上界。"""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                self.total += x.numel()
        return out


@pytest.mark.parametrize("pattern", [CAUSAL, Local(256) | Global(16), Strided(128)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_is_near_t_times_t(pattern: Pattern, padded: bool) -> None:
    t = 16384
    where = Positions.padded(torch.ones(1, t)) if padded else Positions.plain(0, t, CPU)
    with Sizes() as sizes:
        flex._build(pattern, where, where, 128)
    assert t < sizes.largest < t * t / 64


@pytest.mark.parametrize("padded", [False, True])
def test_a_bounded_pattern_costs_linear_time(padded: bool) -> None:
    totals = []
    for t in (4096, 8192):
        where = Positions.padded(torch.ones(1, t)) if padded else Positions.plain(0, t, CPU)
        with Sizes() as sizes:
            flex._build(Sinks(4, 256), where, where, 128)
        totals.append(sizes.total)
    assert totals[1] < 2.2 * totals[0]


def test_plain_positions_share_one_mask_and_others_one_per_forward() -> None:
    first = pattern_block_mask(Local(9), 50, 50, block_size=16)
    assert block_mask(Local(9), *(Positions.plain(0, 50, CPU),) * 2, 16) is first
    assert pattern_block_mask(Local(9), 50, 51, block_size=16) is not first
    one, two = (Positions.padded(torch.ones(1, 20)) for _ in range(2))
    assert block_mask(CAUSAL, one, one, 16) is block_mask(CAUSAL, one, one, 16)
    # 相等但不是同一个对象：值可能已经不同，不能沿用。
    assert block_mask(CAUSAL, two, two, 16) is not block_mask(CAUSAL, one, one, 16)


def test_a_mask_cached_while_generating_can_serve_training() -> None:
    with torch.inference_mode():
        mask = pattern_block_mask(Local(3), 33, 33, block_size=16)
    assert not mask.kv_indices.is_inference() and not mask.kv_num_blocks.is_inference()


def test_the_public_short_forms() -> None:
    pattern = Local(5) | Global(2)
    where = Positions.plain(0, 40, CPU)
    truth = visible(where, where, pattern)
    said = create_mask(pattern_mask_mod(pattern), None, None, 40, 40, "cpu")
    assert torch.equal(said[0], truth)
    mask = pattern_block_mask(pattern, 40, 40, block_size=8)
    assert torch.equal(expanded(mask, truth), truth)
    with pytest.raises(ValueError, match="kv_len=0.*at least 1"):
        pattern_block_mask(pattern, 40, 0)


def reason(**changes: Any) -> str | None:
    asked: dict[str, Any] = {
        "device": CPU, "dtype": torch.float32, "grad": False, "dropout": 0.0,
        "q_len": 256, "head_dim": 64,
    }  # fmt: skip
    return why_not(**{**asked, **changes})


@pytest.fixture
def compiler() -> None:
    missing = reason()
    if missing is not None:
        pytest.skip(f"FlexAttention cannot be compiled here: {missing}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, "dropout=0.1 but FlexAttention has no dropout"),
        ({"dtype": torch.float64}, "float64 is not supported"),
        ({"q_len": 1}, "decoding"),
        ({"grad": True}, "no backward on the CPU"),
        ({"device": torch.device("mps")}, "device mps is not supported"),
    ],
)
def test_what_cannot_be_done_is_said(changes: dict[str, Any], said: str) -> None:
    found = reason(**changes)
    assert found is not None and said in found


@pytest.fixture
def fresh() -> Iterator[None]:
    flex._no_compiler.cache_clear()
    yield
    flex._no_compiler.cache_clear()


@pytest.mark.usefixtures("compiler", "fresh")
def test_a_missing_compiler_is_named() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        found = reason()
    assert found == (
        "no C++ compiler found (looked for no-such-compiler): install one, or set CXX to it"
    )


@pytest.mark.usefixtures("compiler", "fresh")
def test_missing_headers_and_old_processors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(flex.sysconfig, "get_path", lambda name: "/absent")
        assert "Python.h is absent" in (reason() or "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "needs AVX2" in (reason() or "")


def test_a_gpu_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    assert "triton" in (reason(device=gpu) or "")
    monkeypatch.setattr(flex, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "head_dim=8" in (reason(device=gpu, head_dim=8) or "")
    assert "6.1" in (reason(device=gpu) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert reason(device=gpu, grad=True) is None


def test_a_refusal_is_an_error_that_gives_the_reason() -> None:
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    where = Positions.plain(0, 8, CPU)
    with pytest.raises(ValueError, match="attention_backend='flex': .* no backward on the CPU"):
        attend_flex(q, q, q, Plan(where, where, CAUSAL))
    with pytest.raises(ValueError, match="no dropout"):
        attend_flex(q.detach(), q.detach(), q.detach(), Plan(where, where, CAUSAL), 0.1)


def agrees(
    plan: Plan, *, dtype: torch.dtype, heads: tuple[int, int], dim: int, close: float
) -> None:
    """编译的核与 float64 的逐点定义相比；看不见任何键的行恰为 0。"""
    truth = visible(plan.q, plan.k, plan.pattern)[:, None]
    rows, (n_q, n_kv) = len(truth), heads

    def inputs(length: int, n: int) -> Tensor:
        # 与模型里一样，由 (B, T, H, D) 转置而来。
        return torch.randn(rows, length, n, dim, dtype=dtype).transpose(1, 2)

    q, k, v = inputs(plan.q.length, n_q), inputs(plan.k.length, n_kv), inputs(plan.k.length, n_kv)
    with torch.no_grad():
        y = attend_flex(q, k, v, plan)
    wide_k, wide_v = (x.double().repeat_interleave(n_q // n_kv, 1) for x in (k, v))
    scores = (q.double() @ wide_k.mT / math.sqrt(dim)).masked_fill(~truth, -math.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ wide_v
    assert y.shape == q.shape and y.dtype == dtype
    assert (y - expected).abs().max() < close * expected.abs().max()
    blind = ~truth.any(-1).expand(rows, n_q, -1)
    assert (y[blind] == 0).all()


def padded(length: int) -> Positions:
    """第 0 行左填充一块有余：有整块看不见的查询；长度不是块长的倍数。"""
    mask = torch.ones(2, length)
    mask[0, :70] = 0
    return Positions.padded(mask)


@pytest.mark.usefixtures("compiler")
def test_the_compiled_kernel_agrees_and_its_limit_is_an_error() -> None:
    torch._dynamo.reset()
    where = padded(200)
    plan = Plan(where, where, Local(50) | Global(3))
    agrees(plan, dtype=torch.float32, heads=(4, 2), dim=20, close=1e-5)
    # 同样的形状换了坐标不必再编译；到了上限是一句话，而不是悄悄退回未编译的实现。
    with torch._dynamo.config.patch(recompile_limit=1):
        other = Positions.padded(torch.ones(2, 200))
        agrees(
            Plan(other, other, plan.pattern), dtype=torch.float32, heads=(4, 2), dim=20, close=1e-5
        )
        longer = padded(201)
        with pytest.raises(ValueError, match="201 queries.*pad inputs to fewer lengths"):
            agrees(
                Plan(longer, longer, plan.pattern),
                dtype=torch.float32, heads=(4, 2), dim=20, close=1e-5,
            )  # fmt: skip


def packed_and_marked() -> Plan:
    segment = torch.arange(300)[None].expand(2, -1) // torch.tensor([[130], [90]])
    where = Positions.packed(segment)
    marked = torch.zeros(2, 300, dtype=torch.bool)
    marked[:, [3, 140]] = True
    where = Positions(where.pos, where.segment, marked=marked, dense=True)
    return Plan(where, where, Longformer(20, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize(
    "pattern", ["packed", CAUSAL, Fixed(32, 4), Strided(16) | Local(40)], ids=str
)
def test_every_compiled_form_agrees(
    pattern: Pattern | str, dtype: torch.dtype, close: float
) -> None:
    torch._dynamo.reset()
    if isinstance(pattern, Pattern):
        where = Positions.plain(0, 257, CPU)
        # 接着缓存的一段：查询从 100 起，键从 0 起。
        cached = Plan(Positions.plain(100, 157, CPU), where, pattern)
        plans = [Plan(where, where, pattern), cached]
    else:
        plans = [packed_and_marked()]
    for plan in plans:
        agrees(plan, dtype=dtype, heads=(4, 1), dim=64, close=close)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_share_one_block_mask_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """掩码在块之外备好：在编译过的块里求，每层每步都要重来一遍，还断一次图。"""
    from torch._dynamo.testing import CompileCounter

    built: list[int] = []
    build = flex._build

    def counting(*args: Any) -> BlockMask:
        built.append(1)
        return build(*args)

    monkeypatch.setattr(flex, "_build", counting)
    # 显卡上的走法。
    monkeypatch.setattr(flex, "_inside", lambda q: torch.compiler.is_compiling())
    torch._dynamo.reset()
    model = tiny_model(
        torch.float32, attention_pattern="local(4)", attention_backend="flex", n_layer=4
    )
    counter = CompileCounter()
    for block in model.h.values():
        block.compile(backend=counter)
    for padding in (2, 3):
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :padding] = 0
        with torch.no_grad():
            model(tokens(2, 12), attention_mask=mask)
        assert len(built) == padding - 1
    assert counter.frame_count == 1

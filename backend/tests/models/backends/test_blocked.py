"""分块的注意力与稠密的参考逐数相等：任何图样、填充、打包、点名；前向、反向、内存。"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.models.transformer.backends import tiles
from app.models.transformer.backends.attend import attend, attend_blocked, attend_reference
from app.models.transformer.backends.blocked import blocked_attention
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.visibility.atoms import Fixed, Global, Local, Longformer, Sinks, Strided
from app.models.transformer.visibility.pattern import CAUSAL, Pattern
from app.models.transformer.visibility.positions import Positions

from ..helpers import VARIANTS, relative, tiny_model, tokens
from ..strategies import patterns

CPU = torch.device("cpu")
CHEAP: tuple[Pattern, ...] = (
    Local(256),
    Local(64, 4),
    Local(256) | Global(16),
    Sinks(4, 256),
    Longformer(256, 16),
    Strided(128),
    Local(128) | Strided(128),
    Fixed(128, 8),
    Local(64) | Strided(128) | Strided(100),
)


@pytest.fixture(params=[8, 64])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """小块让短序列也有许多块、许多边界。"""
    monkeypatch.setattr(tiles, "QUERIES", request.param)
    tiles._plain.cache_clear()
    yield request.param
    tiles._plain.cache_clear()


def draw_positions(kind: str, length: int, rows: int) -> Positions:
    if kind == "plain":
        return Positions.plain(0, length, CPU)
    left, right = torch.randint(0, length // 3 + 1, (2, rows, 1))
    index = torch.arange(length)
    mask = ((index >= left) & (index < length - right)).long()
    segment = torch.randint(0, 4, (rows, length)).sort(1).values
    where = {
        "padded": lambda: Positions.padded(mask),
        "packed": lambda: Positions.packed(segment),
        "packed, padded": lambda: Positions.packed(segment, mask),
        "marked": lambda: replace(Positions.padded(mask), marked=torch.rand(rows, length) < 0.1),
        "marked, plain": lambda: replace(
            Positions.plain(0, length, CPU), marked=torch.rand(rows, length) < 0.1
        ),
    }
    return where[kind]()


KINDS = ("plain", "padded", "packed", "packed, padded", "marked", "marked, plain")


def heads(rows: int, length: int, dtype: torch.dtype, n: int, kv: int) -> list[Tensor]:
    """q、k、v，内存次序与投影出来的一样 (B, T, H, D)。"""
    return [
        torch.randn(rows, length, h, 8, dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (n, kv, kv)
    ]


def outputs(run: Any, qkv: list[Tensor], plan: MaskPlan) -> list[Tensor]:
    """结果与三个梯度。"""
    torch.manual_seed(7)
    y = run(*qkv, plan)
    return [y.detach(), *torch.autograd.grad(y, qkv, torch.randn(y.shape, dtype=y.dtype))]


def plan_for(pattern: Pattern, where: Positions, dtype: torch.dtype = torch.float64) -> MaskPlan:
    """绕开选择：连选不到分块的情形也要精确。"""
    plan = MaskPlan.build(where, where, pattern, asked="blocked", dtype=dtype)
    return replace(plan, tiling=tiles.tile(pattern, where, dtype))


@pytest.mark.parametrize("kind", KINDS)
@given(pattern=patterns, length=st.integers(1, 70), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=25)
def test_equals_the_reference(
    kind: str, pattern: Pattern, length: int, seed: int, data: st.DataObject
) -> None:
    tiles.QUERIES, before = data.draw(st.sampled_from([4, 16, 64])), tiles.QUERIES
    tiles._plain.cache_clear()
    try:
        torch.manual_seed(seed)
        where = draw_positions(kind, length, 2)
        qkv = heads(2, length, torch.float64, *data.draw(st.sampled_from([(2, 2), (4, 2), (3, 1)])))
        plan = plan_for(pattern, where)
        fast, slow = outputs(attend_blocked, qkv, plan), outputs(attend_reference, qkv, plan)
    finally:
        tiles.QUERIES = before
        tiles._plain.cache_clear()
    for a, b in zip(fast, slow, strict=True):
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("pattern", CHEAP, ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_long_sequences(pattern: Pattern, dtype: torch.dtype, bound: float) -> None:
    """真实的窗口；与同一批数的双精度参考比。"""
    torch.manual_seed(0)
    where = Positions.plain(0, 700, CPU)
    qkv = heads(1, 700, dtype, 2, 2)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    fast = outputs(attend_blocked, qkv, plan_for(pattern, where, dtype))
    y = attend_reference(*exact, plan_for(pattern, where))
    assert relative(fast[0].double(), y) <= bound
    assert fast[0].dtype == dtype


def test_padding_is_exactly_zero_and_takes_no_gradient(block: int) -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 31:] = 0
    where = Positions.padded(mask)
    for pattern in (Local(5) | Global(2), Local(3) | Strided(6), Strided(7)):
        qkv = heads(2, 40, torch.float32, 2, 2)
        hidden = (mask == 0)[:, None, :, None].expand(-1, 2, -1, 8)
        for x in qkv:
            x.data[hidden] = float("nan") if x is not qkv[0] else 1e4
        # 填充处的键值是垃圾也不许渗出来：NaN 只可能来自它们。
        clean = [x.detach().nan_to_num(0.0).requires_grad_() for x in qkv]
        y = attend(*clean, plan_for(pattern, where, torch.float32), dropout=0.0)
        assert (y[hidden] == 0).all()
        for grad in torch.autograd.grad(y.sum(), clean):
            assert (grad[hidden] == 0).all()
            assert grad.isfinite().all()


def test_dropout_is_redrawn_the_same_in_backward() -> None:
    """反向重抽的系数若与前向不同，数值梯度就对不上。"""
    where = Positions.plain(0, 20, CPU)
    for pattern in (Local(4) | Global(2), Local(3) | Strided(5)):
        tiling = plan_for(pattern, where).tiling
        assert tiling is not None
        qkv = heads(1, 20, torch.float64, 2, 1)

        def run(q: Tensor, k: Tensor, v: Tensor, tiling: Any = tiling) -> Tensor:
            torch.manual_seed(3)
            return blocked_attention(q, k, v, tiling, 0.4)

        assert torch.autograd.gradcheck(run, qkv, fast_mode=True)


def test_dropout_keeps_the_mean() -> None:
    """每个权重以 1-p 的概率留下并放大：多次平均回到没有 dropout 的结果。"""
    torch.manual_seed(0)
    where = Positions.plain(0, 30, CPU)
    plan = plan_for(Local(3) | Strided(5), where)
    q, k, v = (x.detach() for x in heads(1, 30, torch.float64, 2, 2))
    draws = torch.stack([attend(q, k, v, plan, dropout=0.3) for _ in range(600)])
    error = draws.mean(0) - attend(q, k, v, plan, dropout=0.0)
    spread = draws.std(0) / 600**0.5
    assert spread.max() > 0.01
    assert (error.abs() <= 6 * spread + 1e-9).all()
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_its_reference_backend(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """整个模型，含填充与损失的梯度；窗口比上下文小得多，块也小。"""
    monkeypatch.setattr("app.models.transformer.backends.choose._WORTH", 10.0)
    torch.manual_seed(0)
    fast = tiny_model(**{**VARIANTS[name], "dropout": 0.0})
    slow = tiny_model(**{**VARIANTS[name], "dropout": 0.0, "attention_backend": "reference"})
    slow.load_state_dict(fast.state_dict())
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    targets = ids.roll(-1, 1).masked_fill(mask == 0, -100)
    losses = [m(ids, targets=targets, attention_mask=mask)["loss"] for m in (fast, slow)]
    assert (losses[0] - losses[1]).abs() <= 1e-12
    for loss in losses:
        loss.backward()
    for (key, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-11, key


class Largest(TorchDispatchMode):
    """记下造出的最大的张量有几个元素。"""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x._base is None:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("pattern", CHEAP, ids=str)
def test_no_square_tensor_is_ever_made(pattern: Pattern) -> None:
    """16,384 个词元，前向与反向，连同造块：没有一个张量大过输入的几倍，更没有 T×T。"""
    length = 16_384
    qkv = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    tiles._plain.cache_clear()
    with Largest() as largest:
        where = Positions.plain(0, length, CPU)
        plan = MaskPlan.build(where, where, pattern, dtype=torch.float32, head_dim=16)
        assert plan.backend == "blocked"
        attend(*qkv, plan, dropout=0.0).sum().backward()
    assert largest.numel <= length * 64
    assert largest.numel < length * length / 100


PEAK = """
import sys, torch
from app.models.transformer.visibility.pattern_text import parse
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.visibility.positions import Positions
from app.models.transformer.backends.attend import attend
torch.set_num_threads(1)
T, H, D = 16384, 4, 64
def resident(field):  # not ru_maxrss: it counts what the parent held before exec
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024
def run(length):
    q, k, v = (torch.ones(1, H, length, D) for _ in range(3))
    where = Positions.plain(0, length, torch.device("cpu"))
    plan = MaskPlan.build(where, where, parse(sys.argv[1]), dtype=torch.float32)
    return attend(q, k, v, plan, dropout=0.0), q, k, v
run(1024)  # 热身：库与线程池的内存不算
before = resident("VmRSS")
run(T)
print((resident("VmHWM") - before) / (4 * H * T * D * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "pattern", ["local(256)", "longformer(256, 16)", "local(128) | strided(128)"]
)
def test_peak_memory_is_little_more_than_the_tensors_themselves(pattern: str) -> None:
    """q、k、v 与输出算 1；稠密的分数在这里是它的 64 倍。"""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, pattern], capture_output=True, text=True, check=True
    )
    assert 0.9 <= float(done.stdout) <= 1.5


def test_work_is_linear_or_t_root_t() -> None:
    """打分的个数，不是时间：长度翻倍，local 翻倍；四倍长、步长两倍时 strided 与 fixed 八倍以内。"""

    def area(pattern: Pattern, length: int) -> int:
        return tiles.tile(pattern, Positions.plain(0, length, CPU), torch.float32).area

    for pattern in (Local(256), Local(256) | Global(16), Longformer(128, 8, 2), Sinks(4, 100)):
        assert area(pattern, 16_384) / area(pattern, 8192) == pytest.approx(2, rel=0.03)
    for make in (lambda s: Strided(s), lambda s: Fixed(s, 1), lambda s: Local(s) | Strided(s)):
        ratio = area(make(128), 16_384) / area(make(64), 4096)
        assert 4 <= ratio <= 8.2


@pytest.mark.parametrize("pattern", [*CHEAP, CAUSAL], ids=str)
def test_estimated_area_is_near_the_real_one(pattern: Pattern) -> None:
    """选后端靠估计；估错一半就会选错。"""
    for length in (1000, 4096):
        real = tiles.tile(pattern, Positions.plain(0, length, CPU), torch.float32).area
        assert tiles.estimated_area(pattern, length) == pytest.approx(real, rel=0.25)

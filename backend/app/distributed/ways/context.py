"""上下文并行：一行的词元分成连续的 W 段，每个 rank 一段；换下的只有坐标、计划与注意力。

| 方式    | 搬什么（每层前向，各 rank）         | 何时精确                         |
|---------|-------------------------------------|----------------------------------|
| halo    | 左邻的最后 reach-1 个键值           | 图样有界，reach-1 <= n           |
| ulysses | 头换词元再换回（arXiv:2309.14509）  | G 被 W 整除                      |
| gather  | 全部键值                            | 总是                             |
| ring    | 键值绕圈（arXiv:2310.01889）        | 总是；内存里只有一段             |

auto 给每种图样各挑：有界的 halo，否则 ulysses，再否则 gather。可见性由坐标说（Positions），
所以打包的文档、任何图样都不必另写；halo 与 ulysses 之后的后端仍是单机的那几个。

一步里：batch 取自己那一段列；份额 = 这一段的有效目标数 / 全局的；参数都完整，梯度在轴上求和，
范数数一次，检查点照旧。均衡损失要整行的词元：各 rank 的之和是整行的，份额也用整行的（split.py）。
只给词元时不通信就知道位置；给了文档号等，各段先拼回再算坐标。
B 批、T 词元数、n = T / W、H 查询头数、G 键值头数、D 头宽。
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.attention import Attention
from app.models.transformer.backends.attend import attend
from app.models.transformer.backends.mask_plan import MaskPlan
from app.models.transformer.experts.moe import MoE
from app.models.transformer.experts.router import Choice
from app.models.transformer.layers.context import CacheKeys, Context, Load, Note, rotation
from app.models.transformer.visibility.inputs import check_ids, coordinates
from app.models.transformer.visibility.pattern import Pattern
from app.models.transformer.visibility.positions import Positions

from ..comm import Ranks
from ..config import ContextWay
from .moves import gather_along, trade, with_halo
from .ring import ring_attention
from .way import Way, check_divides, check_no_dropout, override, sum_gradients

Build = Callable[[Positions, Positions], MaskPlan]


@dataclass(frozen=True, kw_only=True)
class Segment(Positions):
    """一行里我的那一段；whole 是整行的坐标。"""

    whole: Positions


class Route(ABC):
    """一种图样的注意力：我这一段的 q (B, H, n, D)、k/v (B, G, n, D) -> (B, H, n, D)。"""

    def __init__(self, ranks: Ranks, where: Segment, pattern: Pattern, build: Build) -> None:
        self.ranks, self.where, self.pattern = ranks, where, pattern
        self.plan = self.make_plan(build)

    @abstractmethod
    def make_plan(self, build: Build) -> MaskPlan: ...

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Halo(Route):
    @property
    def length(self) -> int:
        """借来的键数：最近 reach 个里，自己不用借。"""
        assert self.pattern.reach is not None
        return self.pattern.reach - 1

    def make_plan(self, build: Build) -> MaskPlan:
        start = self.ranks.rank * self.where.length
        keys = span(self.where.whole, max(0, start - self.length), start + self.where.length)
        return build(keys, keys)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.length:
            k, v = with_halo(torch.stack([k, v]), self.length, self.ranks).unbind()
        # 查询前面补上没有人要的：与键同一组坐标，才能用分块的后端。
        extra = k.shape[2] - q.shape[2]
        y = attend(F.pad(q, (0, 0, extra, 0)), k, v, self.plan, dropout=0.0)
        return y[:, :, extra:]


class Ulysses(Route):
    def make_plan(self, build: Build) -> MaskPlan:
        return build(self.where.whole, self.where.whole)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (trade(x, 1, 2, self.ranks) for x in (q, k, v))
        return trade(attend(q, k, v, self.plan, dropout=0.0), 2, 1, self.ranks)


class Gather(Route):
    def make_plan(self, build: Build) -> MaskPlan:
        return build(self.where, self.where.whole)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = gather_along(torch.stack([k, v]), 3, self.ranks).unbind()
        return attend(q, k, v, self.plan, dropout=0.0)


class Ring(Route):
    def make_plan(self, build: Build) -> MaskPlan:
        # 分数自己算；计划只为把坐标交给 Context。
        return MaskPlan(self.where, self.where.whole, self.pattern, "reference", "ring")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.where.length
        spans = [span(self.where.whole, i * n, (i + 1) * n) for i in range(self.ranks.size)]
        return ring_attention(q, k, v, self.ranks, spans, self.pattern)


ROUTES: dict[ContextWay, type[Route]] = {
    "halo": Halo, "ulysses": Ulysses, "gather": Gather, "ring": Ring,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RoutedContext(Context):
    route: Route


class ContextWays(Way):
    splits_batch: ClassVar[bool] = True

    def batch(self, x: Any) -> Any:
        check_divides("tokens", x.shape[1], "context", self.ranks)
        n = x.shape[1] // self.ranks.size
        return x[:, self.ranks.rank * n : (self.ranks.rank + 1) * n]

    def finish_gradients(self) -> None:
        sum_gradients(self.model.parameters(), self.ranks)


def split_context(model: GPT2Model, ranks: Ranks, way: ContextWay = "auto") -> ContextWays:
    """此后 model 收的每样都是这个 rank 的一段：词元、目标、掩码、文档号、点名的全局词元。

    Raises:
        ValueError: 不能整除，点名的方式对有的图样不精确，有 dropout，专家有容量或抖动。
    """
    check_no_dropout(model, "context", ranks)
    check_divides("context_size", model.config.context_size, "context", ranks)
    check_experts(model.config, ranks)
    for pattern in dict.fromkeys(model.patterns):
        choose_way(way, pattern, model.config.context_size // ranks.size, key_heads(model), ranks)
    override(model, locate=partial(_locate, ranks), contexts=partial(_contexts, model, ranks, way))
    for module in model.modules():
        if isinstance(module, Attention):
            override(module, attend=_attend)
        if isinstance(module, MoE):
            override(module, count_load=partial(_count_load, ranks))
    return ContextWays(model, ranks)


def check_experts(config: GPT2Config, ranks: Ranks) -> None:
    """
    Raises:
        ValueError: 丢掉哪些词元、抖动多少，取决于怎样切。
    """
    for name, value, off in (
        ("capacity_factor", config.moe.capacity_factor, None),
        ("jitter_noise", config.moe.jitter_noise, 0.0),
    ):
        if config.moe_layers and value != off:
            raise ValueError(
                f"moe.{name}={value} with parallel.context={ranks.size}: what it does would depend "
                f"on the split; use moe.{name}={off}"
            )


def choose_way(
    asked: ContextWay, pattern: Pattern, tokens: int, kv_heads: int, ranks: Ranks
) -> tuple[ContextWay, str]:
    """(方式, 英文的理由)；tokens、kv_heads 是一个 rank 的词元数、键值头数。

    Raises:
        ValueError: 点名的方式在这里不精确。
    """
    no_halo, no_ulysses = why_not_halo(pattern, tokens), None
    if kv_heads % ranks.size:
        no_ulysses = f"{kv_heads} key heads do not divide over {ranks.size} ranks"
    refused = {"halo": no_halo, "ulysses": no_ulysses}.get(asked)
    if refused is not None:
        raise ValueError(f"parallel.context_way={asked!r}: {refused}; use 'auto', which chooses")
    if asked != "auto":
        return asked, "asked for"
    if no_halo is None:
        return "halo", f"auto: {pattern} needs {pattern.reach} keys, the neighbour has them"
    if no_ulysses is None:
        return "ulysses", f"auto: heads are traded for tokens, since {no_halo}"
    return "gather", f"auto: all keys are gathered, since {no_halo} and {no_ulysses}"


def key_heads(model: GPT2Model) -> int:
    """一个 rank 的键值头数：张量并行可能已把头分走。"""
    return next(m.kv_heads for m in model.modules() if isinstance(m, Attention))


def why_not_halo(pattern: Pattern, tokens: int) -> str | None:
    if pattern.reach is None:
        return f"{pattern} reaches back without bound"
    if pattern.pinned or pattern.takes_marks:
        return f"{pattern} also sees far keys that the neighbour does not have"
    if pattern.reach - 1 > tokens:
        return f"{pattern} needs {pattern.reach - 1} earlier keys and a rank holds {tokens}"
    return None


def span(whole: Positions, first: int, end: int) -> Positions:
    """[first, end) 的坐标；静态事实一并带上，才选得到快的后端。"""
    part = whole.take(slice(first, end))
    start = None if whole.start is None else whole.start + first
    return Positions(part.pos, part.segment, start, part.marked, whole.dense)


def _locate(
    ranks: Ranks,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    segment_ids: Tensor | None,
    global_attention_mask: Tensor | None,
    cache: object | None,
) -> Segment:
    """GPT2Model.locate 的替身。"""
    if cache is not None:
        raise ValueError("a cache holds whole sequences: use parallel.context=1 to generate")
    tokens = check_ids(input_ids)[1]
    given = attention_mask, positions, segment_ids, global_attention_mask
    if all(x is None for x in given):
        whole = Positions.plain(0, ranks.size * tokens, input_ids.device)
    else:
        ids, *rest = (
            None if x is None else torch.cat([*ranks.gather(x)], 1) for x in (input_ids, *given)
        )
        assert ids is not None
        whole = coordinates(ids, rest[0], rest[1], rest[2], rest[3], None)
    mine = span(whole, ranks.rank * tokens, (ranks.rank + 1) * tokens)
    return Segment(**vars(mine), whole=whole)


def _contexts(
    model: GPT2Model,
    ranks: Ranks,
    asked: ContextWay,
    where: Positions,
    step: CacheKeys | None,
    notes: Sequence[Note],
    dtype: torch.dtype,
) -> list[Context]:
    """GPT2Model.contexts 的替身：每种图样一条路，各层共用。"""
    if not isinstance(where, Segment) or step is not None:
        raise ValueError("features and caches need whole sequences: use parallel.context=1")
    if any("map" in note.wishes for note in notes):
        raise ValueError("return_attention needs whole sequences: use parallel.context=1")
    config, routes = model.config, {}
    for pattern in dict.fromkeys(model.patterns):
        way, _ = choose_way(asked, pattern, where.length, key_heads(model), ranks)
        build = partial(
            MaskPlan.build,
            pattern=pattern,
            asked=config.attention_backend,
            dtype=dtype,
            head_dim=config.head_dim,
            grad=torch.is_grad_enabled(),
        )
        routes[pattern] = ROUTES[way](ranks, where, pattern, build)
    rotary = rotation(config, where, dtype)
    return [
        RoutedContext(where, routes[p].plan, note, layer, rotary, route=routes[p])
        for layer, (p, note) in enumerate(zip(model.patterns, notes, strict=True))
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """Attention.attend 的替身。"""
    assert isinstance(ctx, RoutedContext)
    return ctx.route(q, k, v).transpose(1, 2)


def _count_load(
    ranks: Ranks, load: Tensor, dropped: Tensor, choice: Choice, real: Tensor | None
) -> Load:
    """MoE.count_load 的替身：各 rank 的损失之和是整行的；负载仍是自己那一段的。

    均衡损失是两个平均的乘积：f 要整行的，P 是各段之和。
    """
    here = choice.share.shape[0] if real is None else real.sum()
    counts = ranks.sum(torch.cat([load, load.new_tensor([int(here)])]))
    n = counts[-1].clamp(min=1)
    share, square = choice.share, choice.logits.logsumexp(-1).square()
    if real is not None:
        share, square = share.masked_fill(~real[:, None], 0.0), square.masked_fill(~real, 0.0)
    mean = share.sum(0) / n
    balance = share.shape[1] * (counts[:-1].to(mean.dtype) / n * mean).sum()
    return Load(load, dropped, balance, square.sum() / n)

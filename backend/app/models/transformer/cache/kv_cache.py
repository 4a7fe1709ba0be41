"""键值缓存：由调用者持有，预先分配，每行各有自己的长度。

B 行、G 键值头数、S 槽数、D 头宽、T 本次词元数。
图样有界的层用环：容量是 pinned + reach + max_chunk - 1，不随长度增长；其余的层每个词元一槽。
槽里是什么位置、哪个文档，由 slots 里的算术或坐标表给出，
所以填充、分块、回滚、换行都不需要别的掩码代码。
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import GPT2Config, Position
from ..visibility.pattern import Pattern
from ..visibility.positions import PADDING, Positions
from .cache_step import CacheStep, Home
from .kv_dtype import KVDtype, check_kv_dtype, renamed_quantize
from .limits import check_evictable, check_keepable, check_rising, check_rollback
from .slot_groups import Chunk, Group
from .slots import Layout
from .store import Int8Store, Runs, Store


class KVCache:
    """各层的键与值，以及每个槽的坐标。用 for_model 建。"""

    def __init__(
        self,
        batch_size: int,
        max_len: int | None,
        max_chunk: int,
        position: Position,
        groups: dict[Pattern, Group],
        keys: list[Store],
        values: list[Store],
    ) -> None:
        self.max_len, self.max_chunk = max_len, max_chunk
        self._groups = list(dict.fromkeys(groups.values()))
        self._position = position
        of_layer = {layer: i for i, group in enumerate(self._groups) for layer in group.layers}
        self._home = Home(
            [of_layer[layer] for layer in range(len(keys))],
            {pattern: self._groups.index(group) for pattern, group in groups.items()},
        )
        self._rings = [g.layout for g in self._groups if g.layout.reach is not None]
        self.stores = list(zip(keys, values, strict=True))
        self._rows = torch.arange(batch_size, device=self._groups[0].slots.device)[:, None]
        # 各行步调一致（无填充、无打包）时只记一个整数：写是切片，解码不需要掩码。
        self._uniform: int | None = 0
        # 以下两项只在步调不一致之后有意义。_high 是最长一行的上界，让切片不必等设备。
        self._high = 0
        self._lengths = torch.zeros_like(self._rows[:, 0])
        # 用户自定过位置：位置未必等于到达序号。
        self._explicit = False
        # 环写到过的最远处（整数，或各行不同 (B,)）：序号 < _top - ring 的已被盖掉。
        self._top: int | Tensor = 0
        # 回滚到钉住的前缀之内，环就等于没有写过。
        self._least_pinned = min((layout.pinned for layout in self._rings), default=0)

    @classmethod
    @renamed_quantize
    def for_model(
        cls,
        config: GPT2Config,
        batch_size: int,
        max_len: int | None = None,
        *,
        max_chunk: int = 32,
        ring: bool = True,
        kv_dtype: KVDtype = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """分配。

        Args:
            max_len: 每行最多的词元数。默认 context_size；若每层都是环而位置不是学得的，
                则没有上限。
            max_chunk: 环多留多少槽：至多这么长的一块就地写入，至多能回滚这么多个词元。
                更长的块照样可以，也照样精确，只是要多搬一次。
            ring: False = 有界的图样也留着全部词元，打包、点名、任意回滚都可以。
            kv_dtype: "int8" = 键值各按词元与头量化。

        Raises:
            ValueError: batch_size、max_len 或 max_chunk 小于 1，或 max_len 超过学得的位置数。
        """
        sizes = {"batch_size": batch_size, "max_len": max_len, "max_chunk": max_chunk}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_kv_dtype(kv_dtype)
        if config.position == "learned" and (max_len or 0) > config.context_size:
            raise ValueError(
                f"max_len={max_len} is beyond context_size={config.context_size}: "
                "learned positions end there; use a smaller max_len"
            )
        patterns = config.patterns
        endless = ring and all(pattern.reach is not None for pattern in patterns)
        if max_len is None and not (endless and config.position != "learned"):
            max_len = config.context_size
        room = max_chunk if ring else None
        layouts = [Layout.of(pattern, max_len, room) for pattern in patterns]
        store = Store if kv_dtype is None else Int8Store

        def one_per_layer() -> list[Store]:
            outer, width = (batch_size, config.kv_heads), config.head_dim
            shapes = [(*outer, layout.capacity + 1, width) for layout in layouts]
            return [store.allocate(shape, dtype, device) for shape in shapes]

        groups = {
            layout: Group(layout, [i for i, other in enumerate(layouts) if other == layout], device)
            for layout in dict.fromkeys(layouts)
        }
        by_pattern = {p: groups[layout] for p, layout in zip(patterns, layouts, strict=True)}
        keys, values = one_per_layer(), one_per_layer()
        return cls(batch_size, max_len, max_chunk, config.position, by_pattern, keys, values)

    @property
    def batch_size(self) -> int:
        return self._rows.shape[0]

    @property
    def keys(self) -> list[Tensor]:
        """每层一个 (B, G, S+1, D)，原样（量化时是整数）；S 因层而异。"""
        return [keys.parts[0] for keys, _ in self.stores]

    @property
    def values(self) -> list[Tensor]:
        return [values.parts[0] for _, values in self.stores]

    @property
    def nbytes(self) -> int:
        """占着的全部字节：键、值、尺度与坐标表。"""
        tables = (group.table.nbytes for group in self._groups if group.table is not None)
        return sum(store.nbytes for pair in self.stores for store in pair) + sum(tables)

    @property
    def lengths(self) -> Tensor:
        """(B,) 各行已存的真词元数。"""
        if self._uniform is None:
            return self._lengths.clone()
        return torch.full_like(self._lengths, self._uniform)

    @property
    def uniform(self) -> int | None:
        """各行步调一致时的共同长度，否则 None。"""
        return self._uniform

    @property
    def packed(self) -> bool:
        """存有打包的文档。"""
        table = self._groups[0].table
        return table is not None and table.segment is not None

    def last(self) -> tuple[Tensor, Tensor]:
        """各行最后一个词元的 (pos, segment)，各 (B, 1)；空行为 (-1, 最小的 int64)。"""
        lengths = self.lengths[:, None]
        group = self._groups[0]
        if group.table is None:
            pos, segment = lengths - 1, torch.zeros_like(lengths)
        else:
            at = group.layout.slot((lengths - 1).clamp(min=0))
            pos = group.table.pos.gather(1, at)
            packed = group.table.segment
            segment = torch.zeros_like(at) if packed is None else packed.gather(1, at)
        empty = lengths == 0
        none = torch.iinfo(torch.int64).min
        return pos.masked_fill(empty, PADDING), segment.masked_fill(empty, none)

    def begin(self, positions: Positions) -> CacheStep:
        """为一次前向排好槽位；缓存的长度在 commit 之后才变，前向中途失败则一切如旧。

        Raises:
            ValueError: 这一块放不下，或环留不住它要看的键。
        """
        start, new = self._uniform, positions.length
        plain = positions.segment is None and positions.marked is None
        if start is not None and positions.start == start and plain:
            end = start + new
            self._check_room(end)
            access = [group.aligned(positions, start, self.max_chunk) for group in self._groups]
            step = CacheStep(self.stores, self._home, access, end)
        else:
            check_keepable(self._rings, positions)
            explicit = self._explicit or (positions.start is None and not positions.dense)
            if self._rings and explicit:
                check_rising(positions, self.last())
            self._explicit = explicit
            self._leave_uniform()
            step = self._begin_ragged(positions)
        if new <= self.max_chunk:
            # 就地写会盖掉旧槽，即使前向随后失败；盖掉的都在 reach 之外，只是回滚不到那里了。
            self._raise_top(step)
        return step

    def _begin_ragged(self, positions: Positions) -> CacheStep:
        pos = positions.pos.expand(self.batch_size, -1)
        real = pos != PADDING
        arrival = self._lengths[:, None] + real.long().cumsum(1) - 1
        lengths = self._lengths + real.sum(1)
        high = self._high + positions.length
        beyond = self.max_len is not None and high > self.max_len
        if beyond or pos.device.type == "cpu":
            # 上界可能因填充而虚高；在抱怨之前（以及在读值不花钱的 CPU 上）取真值。
            high = int(lengths.max())
        self._check_room(high)
        self._clear_up_to(high)
        chunk = Chunk(arrival, real, lengths, self._rows, self._high, high)
        access = [group.ragged(positions, chunk, self.max_chunk) for group in self._groups]
        return CacheStep(self.stores, self._home, access, high, lengths)

    def truncate(self, lengths: int | Tensor) -> None:
        """回滚：每行只留前 lengths 个词元（整数，或 (B,) 各行不同）；更短的行不变。

        Raises:
            ValueError: lengths 是负数、形状不对，或环里已没有回滚之后要看的键。
        """
        if isinstance(lengths, int):
            if lengths < 0:
                raise ValueError(f"lengths={lengths} must not be negative")
            if lengths == 0:
                self._reset()
                return
            if self._uniform is not None:
                if lengths < self._uniform:
                    new, old = torch.tensor([lengths]), torch.tensor([self._uniform])
                    check_rollback(self._rings, self._top, self.max_chunk, new, old)
                    self._uniform = lengths
                    self._top = lengths if lengths <= self._least_pinned else self._top
                return
        elif lengths.shape != self._lengths.shape:
            raise ValueError(
                f"lengths has shape {tuple(lengths.shape)}, expected ({self.batch_size},)"
            )
        elif bool((lengths < 0).any()):
            raise ValueError(f"lengths={lengths.tolist()} must not be negative")
        limit = torch.as_tensor(lengths, device=self._lengths.device)
        old = self.lengths
        new = torch.minimum(old, limit)
        check_rollback(self._rings, self._top, self.max_chunk, new, old)
        self._leave_uniform()
        for group in self._groups:
            assert group.table is not None
            dropped = group.layout.arrivals(group.slots, old[:, None]) >= new[:, None]
            pos = group.table.pos[:, :-1].masked_fill(dropped, PADDING)
            group.table = group.table.with_pos(pos)
        self._lengths = new
        if self._rings:
            top = torch.as_tensor(self._top, device=new.device)
            self._top = torch.where(new <= self._least_pinned, new, top)
        if isinstance(lengths, int):
            self._high = min(self._high, lengths)

    def evict(
        self,
        keep_first: int,
        keep_last: int,
        rerotate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> int | Tensor:
        """流式解码（Xiao et al. 2023, arXiv:2309.17453）：丢掉每行的中段，位置在缓存之内重新数。

        每行只留最前 keep_first 个与最后 keep_last 个，位置改为 0 起连续；更短的行不变。此后与
        一个从来没有过中段的缓存一样，只是留下的键值当初看得见中段。

        Args:
            rerotate: (k (B, G, n, D), 往回挪多少 (B|1,)) -> 挪过位置的 k。position='rope' 必须
                给，'none' 不可给。int8 与 bf16 的键每挪一次就舍入一次：一次多丢一些。

        Returns:
            每行丢掉的个数：整数，或步调不一时 (B,)。

        Raises:
            ValueError: 学得的、自定的位置或打包、点名的词元（都不能重新数），或环里已没有要留的。
        """
        table = self._groups[0].table
        check_evictable(keep_first, keep_last, self._position, rerotate, table, self._explicit)
        kept, uniform = keep_first + keep_last, self._uniform
        lengths = self._lengths if uniform is None else self._lengths.new_full((1,), uniform)
        delta = (lengths - kept).clamp(min=0)
        if uniform is not None and uniform <= kept:
            return 0
        moves = [g.plan_move(lengths, delta, keep_first, kept, self._top) for g in self._groups]
        for group, move in zip(self._groups, moves, strict=True):
            for layer in group.layers:
                keys, values = self.stores[layer]
                values.move(move.source, move.target)
                keys.move(move.source, move.target)
                if rerotate is not None:
                    k = keys.read(move.target)
                    turned = torch.where(move.shifted[:, None, :, None], rerotate(k, delta), k)
                    keys.write(Runs(((move.target, None),)), turned)
            if group.table is not None:
                group.table = group.table.with_pos(move.pos)
        top = torch.as_tensor(self._top, device=delta.device).expand_as(delta)
        for layout in self._rings:
            if keep_first > layout.pinned:
                # 绕回过的环里没有开头那几个，挪动之后也不可回滚到它们还要被看见的地方。
                lost = (delta > 0) & (top > layout.capacity)
                least = keep_first + layout.ring + delta
                top = torch.where(lost, torch.maximum(top, least), top)
        if uniform is not None:
            self._uniform, self._top = kept, int(top - delta)
            return uniform - kept
        self._lengths, self._high = lengths - delta, min(self._high, kept)
        self._top = top - delta
        return delta

    def reorder(self, rows: Tensor) -> None:
        """第 i 行换成原来的第 rows[i] 行（束搜索）；行数可以变多或变少。"""
        if rows.dim() != 1 or rows.numel() == 0:
            raise ValueError(f"rows has shape {tuple(rows.shape)}, expected (n,) with n >= 1")
        low, top = int(rows.min()), int(rows.max())
        if low < 0 or top >= self.batch_size:
            raise ValueError(f"rows from {low} to {top} are outside batch_size={self.batch_size}")
        rows = rows.to(self._lengths.device)
        for group in self._groups:
            if self._uniform is not None:
                group.clean = min(self._uniform, group.layout.capacity)
            for layer in group.layers:
                keys, values = self.stores[layer]
                self.stores[layer] = keys.rows(rows, group.clean), values.rows(rows, group.clean)
            if group.table is not None:
                group.table = group.table.rows(rows)
        self._lengths = self._lengths[rows]
        self._rows = torch.arange(rows.numel(), device=rows.device)[:, None]
        if isinstance(self._top, Tensor):
            self._top = self._top[rows]

    def _reset(self) -> None:
        """一个词元也不留：与新建的一样，又步调一致了。"""
        self._uniform, self._high, self._top, self._explicit = 0, 0, 0, False
        for group in self._groups:
            group.table = None

    def _leave_uniform(self) -> None:
        if self._uniform is None:
            return
        self._lengths = self.lengths
        for group in self._groups:
            group.leave_uniform(self._lengths, self._uniform)
        self._high, self._uniform = self._uniform, None

    def _raise_top(self, step: CacheStep) -> None:
        if not self._rings:
            return
        if step.lengths is None:
            assert isinstance(self._top, int)
            self._top = max(self._top, step.high)
        else:
            top = torch.as_tensor(self._top, device=step.lengths.device)
            self._top = torch.maximum(top, step.lengths)

    def commit(self, step: CacheStep) -> None:
        """前向完整之后才让新词元生效。"""
        self._raise_top(step)
        for layer, pair in step.replaced.items():
            self.stores[layer] = pair
        if step.lengths is None:
            self._uniform = step.high
            return
        self._lengths, self._high = step.lengths, step.high
        for group, access in zip(self._groups, step.access, strict=True):
            group.table = access.table

    def _clear_up_to(self, high: int) -> None:
        for group in self._groups:
            end = min(high, group.layout.capacity)
            if end > group.clean:
                for layer in group.layers:
                    for store in self.stores[layer]:
                        store.clear(group.clean, end)
                group.clean = end

    def _check_room(self, end: int) -> None:
        if self.max_len is not None and end > self.max_len:
            raise ValueError(
                f"the cache holds max_len={self.max_len} tokens per row but {end} are needed: "
                "allocate a longer cache or truncate it"
            )

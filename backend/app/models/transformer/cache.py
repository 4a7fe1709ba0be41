"""键值缓存：由调用者持有，预先分配，每行各有自己的长度。

B 行、G 键值头数、S 槽数、D 头宽、T 本次词元数。
一行的第 n 个真词元放在第 n 槽；槽里是什么位置、哪个文档，另有表记着，
所以填充、分块、回滚、换行都不需要别的掩码代码。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GPT2Config
from .positions import PADDING, Positions


class KVCache:
    """各层的键与值，以及每个槽的坐标。

    Attributes:
        keys, values: 每层一个 (B, G, S+1, D)。最后一槽是填充的去处，永不被读。
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], max_len: int) -> None:
        self.keys, self.values, self.max_len = keys, values, max_len
        rows, device = keys[0].shape[0], keys[0].device
        # 各行步调一致（无填充、无打包）时只记一个整数：写是切片，解码不需要掩码。
        self._uniform: int | None = 0
        # 以下三项只在步调不一致之后有意义。_high 是最长一行的上界，让切片不必等设备。
        self._high = 0
        # 这个槽号之前都写过有限的数。空槽虽被遮住，垃圾里的 NaN 乘以权重 0 仍是 NaN，
        # 所以读到之前要清零；一开始就清零整个缓存则白写几百 MB。
        self._clean = 0
        self._lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._pos = torch.full((rows, max_len + 1), PADDING, device=device)
        self._segment: Tensor | None = None

    @classmethod
    def for_model(
        cls,
        config: GPT2Config,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """分配。max_len 为每行最多的词元数，默认 context_size。

        Raises:
            ValueError: batch_size 或 max_len 小于 1，或 max_len 超过学得的位置数。
        """
        max_len = config.context_size if max_len is None else max_len
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"batch_size={batch_size} and max_len={max_len} must be at least 1")
        if config.position == "learned" and max_len > config.context_size:
            raise ValueError(
                f"max_len={max_len} is beyond context_size={config.context_size}: "
                "learned positions end there; use a smaller max_len"
            )
        shape = (batch_size, config.kv_heads, max_len + 1, config.head_dim)

        def one_per_layer() -> list[Tensor]:
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

        return cls(one_per_layer(), one_per_layer(), max_len)

    @property
    def batch_size(self) -> int:
        return self._lengths.shape[0]

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
        return self._segment is not None

    def last(self) -> tuple[Tensor, Tensor]:
        """各行最后一个词元的 (pos, segment)，各 (B, 1)；空行为 (-1, 最小的 int64)。"""
        self._leave_uniform()
        at = (self._lengths - 1).clamp(min=0)[:, None]
        empty = self._lengths[:, None] == 0
        none = torch.iinfo(torch.int64).min
        segment = torch.zeros_like(at) if self._segment is None else self._segment.gather(1, at)
        pos = self._pos.gather(1, at)
        return pos.masked_fill(empty, PADDING), segment.masked_fill(empty, none)

    def begin(self, positions: Positions) -> Step:
        """为一次前向排好槽位；缓存的长度在 Step.commit 之后才变，前向中途失败则一切如旧。

        Raises:
            ValueError: 这一块放不下。
        """
        new = positions.length
        if positions.start is not None and positions.start == self._uniform:
            end = positions.start + new
            self._check_room(end)
            keys = Positions.plain(0, end, self._pos.device)
            return Step(self, keys, end, slice(positions.start, end))
        self._leave_uniform()
        return self._begin_ragged(positions)

    def _begin_ragged(self, positions: Positions) -> Step:
        pos = positions.pos.expand(self.batch_size, -1)
        real = pos != PADDING
        slots = self._lengths[:, None] + real.long().cumsum(1) - 1
        lengths = self._lengths + real.sum(1)
        high = self._high + positions.length
        if high > self.max_len or pos.device.type == "cpu":
            # 上界可能因填充而虚高；在抱怨之前（以及在读值不花钱的 CPU 上）取真值。
            high = int(lengths.max())
        self._check_room(high)
        self._clear_up_to(high)
        slots = slots.masked_fill(~real, self.max_len)
        self._pos.scatter_(1, slots, pos)
        if positions.segment is not None:
            if self._segment is None:
                self._segment = torch.zeros_like(self._pos)
            self._segment.scatter_(1, slots, positions.segment.expand_as(pos))
        # 长度之后的槽里可能有回滚或失败的前向留下的旧坐标：一律当作空。
        filled = torch.arange(high, device=pos.device) < lengths[:, None]
        table = self._pos[:, :high].masked_fill(~filled, PADDING)
        segment = None if self._segment is None else self._segment[:, :high]
        return Step(self, Positions(table, segment), high, slots, lengths)

    def truncate(self, lengths: int | Tensor) -> None:
        """回滚：每行只留前 lengths 个词元（整数，或 (B,) 各行不同）；更短的行不变。"""
        if isinstance(lengths, int):
            if lengths < 0:
                raise ValueError(f"lengths={lengths} must not be negative")
            if self._uniform is not None:
                self._uniform = min(self._uniform, lengths)
                return
        elif lengths.shape != self._lengths.shape:
            raise ValueError(
                f"lengths has shape {tuple(lengths.shape)}, expected ({self.batch_size},)"
            )
        elif bool((lengths < 0).any()):
            raise ValueError(f"lengths={lengths.tolist()} must not be negative")
        self._leave_uniform()
        limit = torch.as_tensor(lengths, device=self._lengths.device)
        self._lengths = torch.minimum(self._lengths, limit)
        if isinstance(lengths, int):
            self._high = min(self._high, lengths)

    def reorder(self, rows: Tensor) -> None:
        """第 i 行换成原来的第 rows[i] 行（束搜索）；行数可以变多或变少。"""
        if rows.dim() != 1 or rows.numel() == 0:
            raise ValueError(f"rows has shape {tuple(rows.shape)}, expected (n,) with n >= 1")
        low, top = int(rows.min()), int(rows.max())
        if low < 0 or top >= self.batch_size:
            raise ValueError(f"rows from {low} to {top} are outside batch_size={self.batch_size}")
        rows = rows.to(self._lengths.device)
        used = self._clean if self._uniform is None else self._uniform
        self.keys = [_gather_rows(layer, rows, used) for layer in self.keys]
        self.values = [_gather_rows(layer, rows, used) for layer in self.values]
        self._lengths, self._pos = self._lengths[rows], self._pos[rows]
        if self._segment is not None:
            self._segment = self._segment[rows]

    def _leave_uniform(self) -> None:
        if self._uniform is None:
            return
        n = self._uniform
        self._pos[:, :n] = torch.arange(n, device=self._pos.device)
        self._lengths = torch.full_like(self._lengths, n)
        self._high = self._clean = n
        self._uniform = None
        self._segment = None

    def _clear_up_to(self, high: int) -> None:
        if high > self._clean:
            for layer in (*self.keys, *self.values):
                layer[:, :, self._clean : high] = 0
            self._clean = high

    def _check_room(self, end: int) -> None:
        if end > self.max_len:
            raise ValueError(
                f"the cache holds max_len={self.max_len} tokens per row but {end} are needed: "
                "allocate a longer cache or truncate it"
            )


def _gather_rows(layer: Tensor, rows: Tensor, used: int) -> Tensor:
    """只搬用过的槽：长缓存里搬空槽是白费带宽。"""
    out = layer.new_empty((rows.numel(), *layer.shape[1:]))
    out[:, :, :used] = layer[:, :, :used][rows]
    return out


@dataclass(frozen=True)
class Step:
    """一次前向对缓存的读写。keys：本次可读的各槽的坐标，(B|1, S')。"""

    cache: KVCache
    keys: Positions
    high: int
    slots: slice | Tensor
    lengths: Tensor | None = None

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """存入新的 k/v (B, G, T, D)，返回应当去看的全部 K/V (B, G, S', D)。"""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if k.dtype != keys.dtype:
            raise ValueError(
                f"the cache has dtype {keys.dtype} but the model computes keys in {k.dtype}: "
                f"allocate the cache with dtype={k.dtype}"
            )
        if isinstance(self.slots, slice):
            keys[:, :, self.slots] = k
            values[:, :, self.slots] = v
            if self.slots.start == 0:
                return k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            keys[rows, :, self.slots] = k.transpose(1, 2)
            values[rows, :, self.slots] = v.transpose(1, 2)
        return keys[:, :, : self.high], values[:, :, : self.high]

    def commit(self) -> None:
        """前向完整之后才让新词元生效。"""
        if self.lengths is None:
            self.cache._uniform = self.high
        else:
            self.cache._lengths, self.cache._high = self.lengths, self.high

"""一次前向对缓存的读写：各层把新的键值写进来，拿回应当去看的全部键值。

B 行、G 键值头数、D 头宽、T 本次词元数、S' 本次可看的键数。
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..visibility.pattern import Pattern
from ..visibility.positions import Positions
from .slot_groups import Access
from .store import Store


@dataclass(frozen=True)
class Home:
    """各层、各图样属于第几组。"""

    of_layer: list[int]
    of_pattern: dict[Pattern, int]


@dataclass(frozen=True)
class CacheStep:
    """一次前向对缓存的读写。谁开始（KVCache.begin），谁在前向完整之后提交（KVCache.commit）。"""

    stores: list[tuple[Store, Store]]
    home: Home
    access: list[Access]
    high: int
    lengths: Tensor | None = None
    # 写了会盖掉本次还要看的键的层：新的存储先放在这里，提交时换上。
    replaced: dict[int, tuple[Store, Store]] = field(default_factory=dict)

    def keys(self, pattern: Pattern) -> Positions:
        """图样为 pattern 的层里，write 返回的键的坐标，(B|1, S')。"""
        group = self.home.of_pattern.get(pattern)
        if group is None:
            known = ", ".join(map(str, self.home.of_pattern))
            raise ValueError(
                f"the cache was made for layers with {known}, not {pattern}: "
                "allocate it with KVCache.for_model(model.config, ...)"
            )
        return self.access[group].keys

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """存入新的 k/v (B, G, T, D)，返回应当去看的全部 K/V (B, G, S', D)。"""
        keys, values = self.stores[layer]
        access = self.access[self.home.of_layer[layer]]
        if k.dtype != keys.dtype:
            raise ValueError(
                f"the cache has dtype {keys.dtype} but the model computes keys in {k.dtype}: "
                f"allocate the cache with dtype={k.dtype}"
            )
        if access.slots is not None:
            keys.write(access.where, k)
            values.write(access.where, v)
            return keys.read(access.slots), values.read(access.slots)
        seen = k, v
        if access.before:
            seen = (
                torch.cat([*map(keys.read, access.before), k], 2),
                torch.cat([*map(values.read, access.before), v], 2),
            )
            keys, values = self.replaced[layer] = keys.clone(), values.clone()
        keys.write(access.where, k)
        values.write(access.where, v)
        return seen

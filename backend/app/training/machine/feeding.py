"""不让显卡等数据：下一批在它还忙着的时候读好；搬运用锁页内存，不等。

一批仍是 (seed, 步) 的纯函数：先读好的只是同一个函数早算了一会儿，轮到的若不是它就扔掉，
所以续训、换步照旧逐位相同。CPU 上读与算抢同样的核，不提前。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class Prefetch(Generic[T]):
    """read(步) -> 一批；不在 CPU 上算时可以先读下一批。

    不用线程：前向与反向排进队列之后、取损失之前，主机本来就空着。
    """

    def __init__(self, read: Callable[[int], T], device: torch.device) -> None:
        # 算在别处，主机才有空。
        self._read, self._ahead = read, device.type != "cpu"
        self._ready: tuple[int, T] | None = None

    def take(self, step: int) -> T:
        """第 step 步的一批。"""
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] == step else self._read(step)

    def look_ahead(self, step: int) -> None:
        """第 step 步的现在就读；读不出的不作声：轮到它时再读一遍，错误在那时抛出。"""
        if not self._ahead:
            return
        try:
            self._ready = (step, self._read(step))
        except (OSError, ValueError):
            self._ready = None


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """搬到 device；CPU 上不搬。不锁页的 non_blocking 在 CUDA 上照样要等一份暂存的副本。"""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

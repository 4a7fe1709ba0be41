"""一段计算里同时活着的张量最多占多少字节：数 torch 造出的每块存储，与机器和分配器无关。"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """with 里新造的；peak 是最多的那一刻。"""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is(x)}
        for x in tree_leaves(out):
            if _is(x) and x.untyped_storage()._cdata not in old:
                self._add(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._seen:
            self.now += storage.nbytes()
            self._seen[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self._seen[key]


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)

"""分片上的 AdamW，逐位等于整个张量上的融合的 AdamW。

融合的内核在 CPU 上按整个向量算，凑不满的最后几个元素另走标量的路，差一个 ulp；切成几份，末尾就
多出几处（每步 2–4% 的元素，docs/decisions/021）。所以这里只让整个张量真正的末尾走标量，
别处凑不满的补齐成一个向量。GPU 的内核逐个元素算，不必如此。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .rows import local, rows_of

_CPU_VECTOR_BYTES = {"AVX512": 64}


class ShardAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True)，参数可以是 DTensor；状态也是，切法相同。"""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            held: list[list[Any]] = [[], [], [], [], [], []]
            self._init_group(group, *held)
            params, *_, steps = held
            if not params:
                continue
            torch._foreach_add_(steps, 1)
            pieces, back = [], []
            for four in zip(*held[:4], steps, strict=True):
                for piece in _pieces(four[:4]):
                    pieces.append((*piece.tensors, four[4]))
                    back.append(piece)
            self._update(group, pieces)
            for piece in back:
                piece.put_back()
        return loss

    @staticmethod
    def _update(group: dict[str, Any], pieces: list[tuple[Tensor, ...]]) -> None:
        if not pieces:
            return
        params, grads, averages, squares, steps = map(list, zip(*pieces, strict=True))
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params, grads, averages, squares, [], steps,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip


class _Piece:
    """参数、梯度、两个矩的同一段；home 不是 None 时 tensors 是补齐的副本，做完要写回去。"""

    def __init__(self, tensors: tuple[Tensor, ...], pad_to: int = 0) -> None:
        self.tensors, self.home = tensors, None
        if pad_to:
            self.home = tensors
            self.tensors = tuple(torch.nn.functional.pad(t, (0, pad_to - len(t))) for t in tensors)

    def put_back(self) -> None:
        if self.home is not None:
            for mine, done in zip(self.home, self.tensors, strict=True):
                mine.copy_(done[: len(mine)])


def _pieces(four: tuple[Tensor, ...]) -> Iterator[_Piece]:
    """参数、梯度、两个矩 -> 各段。"""
    whole, rows = four[0], rows_of(four[0])
    flat = tuple(local(t).reshape(-1) for t in four)
    count = len(flat[0])
    if rows.number == rows.whole or not whole.is_cpu:
        yield from [_Piece(flat)] if count else []
        return
    width = _CPU_VECTOR_BYTES.get(torch.backends.cpu.get_cpu_capability(), 32)
    width //= whole.element_size()
    # 手里的这些里，整个张量里走向量的有几个；其余是真正的末尾。
    first = rows.first * (whole.numel() // rows.whole)
    vector = max(0, min(count, whole.numel() // width * width - first))
    even = vector // width * width
    cuts = ((0, even, 0), (even, vector, width), (vector, count, 0))
    for begin, end, pad_to in cuts:
        if end > begin:
            yield _Piece(tuple(t[begin:end] for t in flat), pad_to)

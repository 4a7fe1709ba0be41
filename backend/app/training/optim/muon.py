"""Muon（Jordan 2024, kellerjordan.github.io/posts/muon）：动量先正交化，再作更新。

torch.optim.Muon 是它的对照（tests/training/test_muon.py），没有直接用它，因为两件事它做不到：
- 融合的矩阵（c_attn 里的 q、k、v，SwiGLU 的门与值）须各自正交化。拼着正交化，几部分分食同一组
  奇异方向，梯度大的 v 占去 q 与 k 的更新；分开做，Jordan 的原文也说更好。
- 它总用 bfloat16 迭代，没有这种硬件的 CPU 上很慢；这里只在 GPU 上用 bfloat16。

N 同形矩阵的个数，A 行数，B 列数。
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.fused import parts_of

from .adamw import adamw_for
from .build import (
    FLOAT32_BYTES,
    Named,
    OptimizerKind,
    Shapes,
    is_matrix,
    nbytes,
    register,
    trainable,
)

MOMENTUM = 0.95
# 五次迭代的系数：在零处的斜率取到最大，不求收敛到 1（Jordan 2024）。
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# 正交矩阵元素的均方根是 1/sqrt(max(A, B))；AdamW 更新的约是 0.2（Liu 2025, arXiv:2502.16982）。
ADAMW_RMS = 0.2
_TINY = 1e-7
_ROUTER = ".router.weight"


@register("muon")
class Muon(OptimizerKind):
    """各块里的矩阵用 Muon，叠起来的专家各自正交化，其余用 AdamW。

    词嵌入、位置嵌入、不共享的输出头是查表，每步只动几行，正交化没有意义；路由器每行是一个专家的
    打分，正交化会逼着冷热不同的专家走一样大的步。
    """

    keeps = "Muon's momentum for the matrices of the blocks, AdamW's moments for the rest"

    def build(self, model: GPT2Model) -> tuple[torch.optim.Optimizer, str]:
        named = trainable(model)
        adamw, why = adamw_for([(n, p) for n, p in named if not _takes(n, p.shape)], self.config)
        matrices = [(n, p) for n, p in named if _takes(n, p.shape)]
        if not matrices:
            return adamw, why
        group = self._group(matrices, model.config)
        why = f"Muon for {len(matrices)} matrices (peak lr {group['lr']:g}), {why} for the rest"
        return MuonAdamW(group, adamw), why

    def _group(self, named: Named, shape: GPT2Config) -> dict[str, Any]:
        config = self.config
        return {
            "params": [p for _, p in named],
            "names": [name for name, _ in named],
            "parts": [_parts(name, p, shape) for name, p in named],
            "lr": config.lr if config.muon_lr is None else config.muon_lr,
            "weight_decay": config.weight_decay,
        }

    def state_bytes(self, shapes: Shapes) -> int:
        """AdamW 两个矩，Muon 一个动量。"""
        return 2 * nbytes(shapes) - nbytes(_taken(shapes))

    def update_bytes(self, shapes: Shapes) -> int:
        """正交化之前的更新，另加同形的矩阵（各块一个）叠成的一摞与迭代里的两份。"""
        taken = _taken(shapes)
        blocks = len({name.split(".")[1] for name in taken})
        largest = max((math.prod(shape) for shape in taken.values()), default=0)
        return nbytes(taken) + 3 * FLOAT32_BYTES * largest * blocks


def _takes(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("h.") and is_matrix(name, shape) and not name.endswith(_ROUTER)


def _taken(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if _takes(name, shape)}


def _parts(name: str, parameter: nn.Parameter, shape: GPT2Config) -> list[int]:
    """融合的矩阵由哪几块叠成（各块的行数），见本文件开头。E 个专家是 E 份。"""
    rows, experts = parameter.shape[-2], len(parameter) if parameter.ndim == 3 else 1
    return experts * list(parts_of(name, rows, shape).values())


class MuonAdamW(torch.optim.Optimizer):
    """一个优化器，两种更新：带 "parts" 的组用 Muon，其余用 AdamW。

    它就是一个 torch 优化器，所以调学习率、保存与复原同单独的 AdamW 没有分别；
    两种组的学习率可以不同。Muon 的更新缩放到 AdamW 的大小（即 torch 的
    adjust_lr_fn="match_rms_adamw"），故 AdamW 的学习率与衰减可以照用；衰减是解耦的：
    p 先乘 1 - lr·weight_decay，这里的 lr 不带形状的缩放。

    Args:
        matrices: Muon 的组：params 都是矩阵（或叠起来的），parts 是各矩阵按行分成几块的行数，
            另有 lr 与 weight_decay。
        adamw: 管其余参数的 AdamW。
    """

    def __init__(self, matrices: dict[str, Any], adamw: torch.optim.AdamW) -> None:
        super().__init__([matrices, *adamw.param_groups], {})
        self._adamw = adamw

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        # 复原会换掉这两个对象，所以每步都重新交给里面的 AdamW。
        self._adamw.param_groups = [g for g in self.param_groups if "parts" not in g]
        self._adamw.state = self.state
        loss = self._adamw.step(closure)
        for group in self.param_groups:
            if "parts" in group:
                self._update_matrices(group)
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for matrix, rows in zip(group["params"], group["parts"], strict=True):
            if matrix.grad is None:
                continue
            direction = self._nesterov(matrix)
            matrix.mul_(1 - lr * group["weight_decay"])
            # 叠起来的专家 (E, A, B) 当作 E·A 行。
            flat, wanted_flat = matrix.view(-1, matrix.shape[-1]), direction.flatten(0, -2)
            pairs = zip(flat.split(rows), wanted_flat.split(rows), strict=True)
            for part, wanted in pairs:
                by_shape.setdefault(part.shape, []).append((part, wanted))
        # 同形的叠在一起做：小模型里时间全在一次次的调用上。
        for shape, found in by_shape.items():
            updates = orthogonalize(torch.stack([wanted for _, wanted in found]))
            for (part, _), update in zip(found, updates, strict=True):
                part.add_(update, alpha=-lr * ADAMW_RMS * math.sqrt(max(shape)))

    def _nesterov(self, matrix: Tensor) -> Tensor:
        """矩阵的动量，向前多看一步。"""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer: Tensor = state["momentum_buffer"]
        assert matrix.grad is not None
        buffer.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(buffer, MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, A, B) -> (N, A, B)：各自的 U·S·Vᵀ 换成 U·S'·Vᵀ，S' 在 1 上下；零矩阵仍是零。

    Newton–Schulz 迭代：只有矩阵乘法，不求奇异值分解。
    """
    a, b, c = COEFFICIENTS
    # 在短的一边上迭代，乘法最少。
    flip = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if flip else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_TINY)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if flip else x

"""Muon（Jordan 2024, kellerjordan.github.io/posts/muon）：动量先正交化，再作更新。

torch.optim.Muon 是它的对照（tests/training/test_muon.py），没有直接用它，因为两件事它做不到：
- 融合的矩阵（c_attn 里的 q、k、v，SwiGLU 的门与值）须各自正交化。拼着正交化，几部分分食同一组
  奇异方向，梯度大的 v 占去 q 与 k 的更新；分开做，Jordan 的原文也说更好。
- 它总用 bfloat16 迭代，没有这种硬件的 CPU 上很慢；这里只在 GPU 上用 bfloat16。

N 同形矩阵的个数，A 行数，B 列数。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from app.distributed.comm import Ranks
from app.distributed.sharding.muon import Owners, rows_inside
from app.distributed.sharding.rows import is_sharded, local, rows_of
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
# 长边至少是短边的这么多倍，在 G 上迭代才省（17 + 2r < 5 + 10r）。
_LONG = 2
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
        pairs = zip(group["params"], group["parts"], strict=True)
        taken = [(matrix, parts) for matrix, parts in pairs if matrix.grad is not None]
        if not taken:
            return
        wanted = self._nesterov([matrix for matrix, _ in taken])
        owners = self._owners([matrix for matrix, _ in taken])
        whole = dict(enumerate(wanted)) if owners is None else owners.gather(wanted)
        orthogonalize_parts(whole, [parts for _, parts in taken])
        updates = wanted if owners is None else owners.scatter(whole, wanted)
        torch._foreach_mul_([local(m) for m, _ in taken], 1 - lr * group["weight_decay"])
        # 同样大的一次加完：GPU 上是一次启动，CPU 上省的是 Python。
        steps: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for (matrix, parts), update in zip(taken, updates, strict=True):
            rows = rows_of(matrix)
            # 叠起来的专家 (E, A, B) 当作 E·A 行。
            tall = math.prod(matrix.shape[1:-1])
            flat, update = local(matrix).flatten(0, -2), update.flatten(0, -2)
            for part, begin, end in rows_inside(parts, rows.first * tall, rows.number * tall):
                into, by = steps.setdefault(max(parts[part], matrix.shape[-1]), ([], []))
                into.append(flat[begin:end])
                by.append(update[begin:end])
        for size, (into, by) in steps.items():
            torch._foreach_add_(into, by, alpha=-lr * ADAMW_RMS * math.sqrt(size))

    def _owners(self, matrices: list[Tensor]) -> Owners | None:
        """切开的矩阵要先聚到各自的主人那里；没有切开就是 None。"""
        cut = [matrix for matrix in matrices if is_sharded(matrix)]
        if not cut:
            return None
        if len(cut) < len(matrices):
            raise ValueError(
                f"{len(cut)} of Muon's {len(matrices)} matrices are sharded and the others are not:"
                " shard the whole model with shard_model, or use optim.name=adamw"
            )
        mesh = cut[0].device_mesh  # type: ignore[attr-defined]
        return Owners([matrix.shape for matrix in cut], Ranks.of(mesh.get_group()))

    def _nesterov(self, matrices: list[Tensor]) -> list[Tensor]:
        """各矩阵（手里的几行）的动量，向前多看一步；新的张量。"""
        buffers, grads = [], []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            assert matrix.grad is not None
            buffers.append(local(state["momentum_buffer"]))
            grads.append(local(matrix.grad))
        torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)
        return list(torch._foreach_lerp(grads, buffers, MOMENTUM))


def orthogonalize_parts(whole: dict[int, Tensor], parts: Sequence[Sequence[int]]) -> None:
    """{第几个: (A, B) 或 (E, A, B)}，就地：拼成它的各部分各自正交化。

    同形的叠在一起做：小模型里时间全在一次次的调用上；叠几个都逐位相同。
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for i, matrix in whole.items():
        # 叠起来的专家 (E, A, B) 当作 E·A 行。
        for part in matrix.view(-1, matrix.shape[-1]).split(list(parts[i])):
            by_shape.setdefault(part.shape, []).append(part)
    for found in by_shape.values():
        torch._foreach_copy_(found, list(orthogonalize(torch.stack(found)).unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, A, B) -> (N, A, B)：各自的 U·S·Vᵀ 换成 U·S'·Vᵀ，S' 在 1 上下；零矩阵仍是零。

    Newton–Schulz 迭代：只有矩阵乘法，不求奇异值分解。
    """
    # 在短的一边上迭代，乘法最少。
    flip = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if flip else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_TINY)
    if x.is_cuda:
        x = iterate(x.bfloat16())
    else:
        x = iterate_gram(x) if x.shape[-1] >= _LONG * x.shape[-2] else iterate(x)
    return x.mT if flip else x


def iterate(x: Tensor) -> Tensor:
    """X <- (a·I + b·G + c·G²)·X，G = X·Xᵀ，五次；x (N, A, B)，A 不大于 B，范数不大于 1。"""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterate_gram(x: Tensor) -> Tensor:
    """同上，只在 (A, A) 的 G 上迭代：P 是 G 的多项式，G <- P·G·P，最后各次的 P 之积乘 X 一次。

    以一次 (A, A)·(A, A) 为一，B = r·A 时是 17 + 2r 次，iterate 是 5 + 10r 次：前馈 r = 4，省 44%。
    G 的舍入使零奇异值略微为负，每次又放大 a² 倍：五次之后 float32 约 0.02，bfloat16 则发散，
    所以 GPU 上不用。
    """
    a, b, c = COEFFICIENTS
    gram, total = x @ x.mT, None
    for last in range(ITERATIONS - 1, -1, -1):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        total = p if total is None else p @ total
        if last:
            gram = p @ gram @ p
    assert total is not None
    return total @ x

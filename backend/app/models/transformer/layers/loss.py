"""输出头与交叉熵合在一起，按词元分块算：整张 (N, V) 的 logits 从不同时存在。

N 词元数（B·T）、R 一块的行数、C 宽度、V 词表。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..visibility.inputs import check_like, readable
from .cpu_products import product

IGNORE = -100
# 一块 logits 的上限：够大使矩阵乘吃满，又只占峰值内存的一小部分。
CHUNK_BYTES = 50 * 2**20
# GPU 上每块另要读写一遍 (V, C) 的梯度（GPT-2 的 154 MB），块小了时间全在那里。
GPU_CHUNK_BYTES = 2**30
# 一块的行数与补过的词表都是它的倍数：矩阵的步长不是 16 字节的倍数，cuBLAS 就退到上两代的核。
GPU_ROWS = 128


def check_targets(targets: Tensor, input_ids: Tensor, vocab_size: int, use_cache: bool) -> None:
    """
    Raises:
        ValueError: 形状、类型不对，有词表之外的 id，或要从缓存求梯度。
    """
    if use_cache and torch.is_grad_enabled():
        raise ValueError(
            "targets with use_cache=True would cut gradients at the cached keys: "
            "use use_cache=False to train, or torch.no_grad() to score"
        )
    check_like(input_ids, torch.int64, targets=targets)
    if not readable(input_ids):
        return
    wrong = targets[((targets < 0) & (targets != IGNORE)) | (targets >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"targets contains {int(wrong[0])}, neither {IGNORE} (ignored) nor in "
            f"0..{vocab_size - 1}"
        )


# (一块的 logits (R, V), 目标 (R,), 是哪些行) -> 各行的损失 (R,) 与它对 logits 的梯度 (R, V)；
# 可以就地改写 logits。
Chunk = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]


def cross_entropy(
    logits: Tensor, labels: Tensor, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """(R, V)、(R,) -> 各行的交叉熵 (R,) 与 softmax - onehot (R, V)。就地改写 logits。

    忽略的行照算（借用第 0 个词），由调用者乘 0。
    """
    logits = logits.to(wide_dtype(logits.dtype))
    index = labels.clamp(min=0)[:, None]
    torch.log_softmax(logits, -1, out=logits)
    loss = -logits.gather(1, index).squeeze(1)
    grad = logits.exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad


def cross_entropy_fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """同上的函数式写法，给 inductor 融成两遍：GPU 上不融合要读写 (R, V) 十来遍。

    不收 rows：编译器会为每个不同的切片另编译一遍。
    """
    index = labels.clamp(min=0)[:, None]
    logs = logits.to(wide_dtype(logits.dtype)).log_softmax(-1)
    hit = torch.arange(logits.shape[1], device=logits.device) == index
    return -logs.gather(1, index).squeeze(1), (logs.exp() - hit.to(logs.dtype)).to(logits.dtype)


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: Chunk = cross_entropy
) -> Tensor:
    """平均交叉熵，标量。hidden (B, T, C)、weight (V, C)、targets (B, T)，-100 不计。

    没有一个有效目标时为 0（梯度也为 0），不是 NaN。chunk 可以换成别的损失。
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    loss: Tensor = _ChunkedHead.apply(flat, weight, labels, chunk)
    return loss


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """各词元的交叉熵 (B, T)，不计的是 0；形状同上。

    梯度要等各词元的权重，所以反向里重算 logits：四次大矩阵乘。
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    losses: Tensor = _TokenLosses.apply(flat, weight, labels)
    return losses.view(targets.shape)


class _ChunkedHead(torch.autograd.Function):
    """前向里顺手把梯度也算好：共三次大矩阵乘，与不分块时相同；反向里重算 logits 则要四次。"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: Chunk) -> Tensor:
        h, w = as_computed(hidden), as_computed(weight)
        needs = ctx.needs_input_grad
        loss, *ctx.ready = _loss_and_gradients(h, w, labels, (hidden, weight), needs, chunk)
        ctx.computed, ctx.chunk = h.dtype, chunk
        ctx.save_for_backward(hidden, weight, labels)
        return loss.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # 交出仅有的一份引用，否则 .grad 会再复制一遍 (V, C)。retain_graph 的第二次反向才重算。
        ready, ctx.ready = ctx.ready, None
        if ready is None:
            hidden, weight, labels = ctx.saved_tensors
            h, w = hidden.to(ctx.computed), weight.to(ctx.computed)
            given = (hidden, weight)
            _, *ready = _loss_and_gradients(h, w, labels, given, ctx.needs_input_grad, ctx.chunk)
        if _is_one(scales[0]):
            return *ready, None, None
        grad_hidden, grad_weight = (None if g is None else g.mul_(scales[0]) for g in ready)
        return grad_hidden, grad_weight, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        h, w = as_computed(hidden), as_computed(weight)
        ctx.computed = h.dtype
        ctx.save_for_backward(hidden, weight, labels)
        nothing = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        given = (hidden, weight)
        parts, *_ = _chunks(h, w, labels, nothing, given, (False, False), cross_entropy)
        return torch.cat(parts) * (labels != IGNORE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, labels = ctx.saved_tensors
        h, w = hidden.to(ctx.computed), weight.to(ctx.computed)
        share = (grads[0] * (labels != IGNORE)).to(hidden.dtype)[:, None]
        _, grad_hidden, grad_weight = _chunks(
            h, w, labels, share, (hidden, weight), ctx.needs_input_grad, cross_entropy
        )
        return grad_hidden, grad_weight, None


def _loss_and_gradients(
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    given: tuple[Tensor, Tensor],
    needs: Sequence[bool],
    chunk: Chunk,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """有效目标的平均，与它的梯度。"""
    keep = labels != IGNORE
    count = keep.sum().clamp(min=1)
    share = (keep.to(given[0].dtype) / count)[:, None]
    parts, grad_hidden, grad_weight = _chunks(h, w, labels, share, given, needs, chunk)
    total = torch.zeros((), dtype=wide_dtype(given[0].dtype), device=h.device)
    for part, mask in zip(parts, keep.split([len(p) for p in parts]), strict=True):
        total += (part * mask).sum()
    return total / count, grad_hidden, grad_weight


def _chunks(
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    share: Tensor,
    given: tuple[Tensor, Tensor],
    needs: Sequence[bool],
    chunk: Chunk,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """一块一块地：各块的损失，与 sum(share·损失) 对 hidden、weight 的梯度。

    h、w 是换成计算精度的 given = (hidden (N, C), weight (V, C))；梯度仍用参数的精度累加。
    每行的份额 share (N, 1) 乘在 (N, C) 的两头，不去动 (N, V)。
    """
    hidden, weight = given
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.empty_like(weight) if needs[1] else None
    losses, vocab = [], weight.shape[0]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        extra = padded_vocab(w) - vocab
        wide = F.pad(w, (0, 0, 0, extra)) if extra else w
        shared = (hidden * share).to(h.dtype) if needs[1] else h
        for rows in row_chunks(labels, vocab):
            logits = product(h[rows], wide)
            loss, grad = chunk(logits[:, :vocab], labels[rows], rows)
            losses.append(loss)
            if not (needs[0] or needs[1]):
                del grad, logits
                continue
            grad = _widened(grad, logits)
            if grad_hidden is not None:
                # 权重放在左边：行数远少于词表时快一些（docs/decisions/003）。
                grad_hidden[rows] = (wide.t() @ grad.t()).t()
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), shared[rows], first=rows.start == 0)
            # 放掉再算下一块：同时只有一块。
            del grad, logits
        if grad_hidden is not None:
            grad_hidden *= share
    return losses, grad_hidden, grad_weight


def padded_vocab(weight: Tensor) -> int:
    """GPU 上半精度的 (V, C) 补几行零成 (V', C)，返回 V'。

    一行 logits 不是 16 字节的整数倍（GPT-2 的 50257），三次乘法就都退到上两代的核，慢四倍
    （docs/decisions/026）。
    """
    vocab = weight.shape[0]
    if weight.device.type == "cpu" or weight.itemsize > 2 or vocab * weight.itemsize % 16 == 0:
        return vocab
    return -(-vocab // GPU_ROWS) * GPU_ROWS


def _widened(grad: Tensor, logits: Tensor) -> Tensor:
    """(R, V) 的梯度，精度与宽同 logits (R, V')，不同就写进它用过的内存。

    补出的列是 0：它们的权重是 0，logits 也就是 0。
    """
    if grad.shape == logits.shape and grad.dtype == logits.dtype:
        return grad
    logits[:, : grad.shape[1]] = grad
    return logits


def _is_one(scale: Tensor) -> bool:
    """不切微批时就是 1，省去读写一遍 (V, C)；别的设备上问它的值要同步，不问。"""
    return readable(scale) and scale.item() == 1.0


def as_computed(x: Tensor) -> Tensor:
    """autocast 在 autograd.Function 里不缓存转换：在这里转一次，而不是每块一次。"""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """半精度的 logits 升到 float32 再归约。"""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES


def row_chunks(labels: Tensor, vocab: int) -> Iterator[slice]:
    """差不多一样大的块：最后剩下的小块最慢。"""
    n, unit = labels.shape[0], 1 if labels.device.type == "cpu" else GPU_ROWS
    most = max(1, chunk_bytes(labels.device) // (vocab * 4))
    size = -(-n // -(-n // most)) if n else 1
    size = -(-size // unit) * unit
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out += a @ b，第一次是 out = a @ b；精度相同时一步写入，不另占一份 (V, C)。

    a 可以多几行（补出的词），不要它们。
    """
    if a.dtype != out.dtype or len(a) != len(out):
        found = (a @ b)[: len(out)]
        out.copy_(found) if first else out.add_(found)
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)

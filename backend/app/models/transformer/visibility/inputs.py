"""一次前向的输入归成一种说法，坐标；读到什么就检查什么，错误点名两个值与改法。

看张量的值（词表外的 id、次序颠倒的文档）只在 CPU 上做：在加速器上读值会停下整条流水线。
B 批、T 本次词元数。
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .positions import PADDING, Positions


class Past(Protocol):
    """此前的词元里，坐标要知道的；见 KVCache。"""

    @property
    def uniform(self) -> int | None: ...
    @property
    def packed(self) -> bool: ...
    @property
    def lengths(self) -> Tensor: ...
    def last(self) -> tuple[Tensor, Tensor]: ...


def coordinates(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    segment_ids: Tensor | None,
    global_attention_mask: Tensor | None,
    past: Past | None,
) -> Positions:
    """用户给的各种说法 -> 坐标；各张量 (B, T)，意思见 GPT2Model.forward。

    Raises:
        ValueError: 形状、类型不对，掩码中间有洞，文档号或自定的位置倒退。
    """
    check_like(
        input_ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask
    )
    check_like(input_ids, torch.int64, positions=positions, segment_ids=segment_ids)
    if readable(input_ids):
        if attention_mask is not None:
            _check_mask(attention_mask)
        if segment_ids is not None:
            _check_documents(segment_ids, attention_mask)
        if positions is not None:
            _check_rising(positions, attention_mask, segment_ids)
    if segment_ids is None and past is not None and past.packed:
        segment_ids = past.last()[1].expand_as(input_ids)
    where = _place(input_ids, attention_mask, positions, segment_ids, past)
    if global_attention_mask is None:
        return where
    return replace(where, marked=global_attention_mask != 0)


def _place(
    input_ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    segment: Tensor | None,
    past: Past | None,
) -> Positions:
    if positions is not None:
        pos = positions if mask is None else positions.masked_fill(mask == 0, PADDING)
        return Positions(pos, segment)
    if segment is not None:
        return Positions.packed(segment, mask, None if past is None else past.last())
    if mask is not None:
        return Positions.padded(mask, 0 if past is None else past.lengths[:, None])
    if past is None or past.uniform is not None:
        start = 0 if past is None or past.uniform is None else past.uniform
        return Positions.plain(start, input_ids.shape[1], input_ids.device)
    return Positions.padded(torch.ones_like(input_ids), past.lengths[:, None])


def check_ids(input_ids: Tensor) -> tuple[int, int]:
    """(B, T)。

    Raises:
        ValueError: 不是 (B, T) 的 int64，或空的。
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, tokens), both >= 1"
        )
    if input_ids.dtype != torch.int64:
        raise ValueError(
            f"input_ids has dtype {input_ids.dtype}, expected torch.int64: use .long()"
        )
    return input_ids.shape[0], input_ids.shape[1]


def check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """
    Raises:
        ValueError: 有词表之外的 id。
    """
    if not readable(input_ids):
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"input_ids contains {bad}, outside 0..{vocab_size - 1} "
            f"(vocab_size={vocab_size}): check that the tokenizer belongs to this model"
        )


def check_fits(where: Positions, context_size: int) -> None:
    """学得的位置只有 context_size 个，超出必须说清，而不是下标错误。

    Raises:
        ValueError: 超出。
    """
    if where.start is not None:
        longest = where.start + where.length
    elif readable(where.pos):
        longest = int(where.pos.max()) + 1
    else:
        return
    if longest > context_size:
        raise ValueError(
            f"the sequence needs {longest} positions but context_size={context_size}: "
            "shorten the input, or generate with overflow='slide'"
        )


def check_like(input_ids: Tensor, dtype: torch.dtype | None = None, **given: Tensor | None) -> None:
    """
    Raises:
        ValueError: 形状与 input_ids 不同，或类型不是 dtype。
    """
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but input_ids has {tuple(input_ids.shape)}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}: use .long()")


def readable(tensor: Tensor) -> bool:
    """看它的值不花什么，而且有值（规划用的假张量没有）。"""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not is_fake(tensor)


def _check_mask(mask: Tensor) -> None:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold only 1 (token) and 0 (padding)")
    # 中间有洞时下标之差不再是位置之差，而按下标切窗口的路径靠的就是它。
    begins = (mask[:, 1:] > mask[:, :-1]).sum(1) + mask[:, 0]
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding between tokens in row {row}: padding may stand before "
            "or after the tokens of a row, not among them"
        )


def _check_documents(segment: Tensor, mask: Tensor | None) -> None:
    seen = segment if mask is None else segment.masked_fill(mask == 0, int(segment.min()))
    seen = seen if mask is None else torch.where(mask == 0, seen.cummax(1).values, seen)
    if bool((seen[:, 1:] < seen[:, :-1]).any()) or int(seen.min()) < 0:
        raise ValueError(
            "segment_ids must be >= 0 and must not decrease along a row: number the documents "
            "0, 1, 2, ... in the order in which they are packed"
        )


def _check_rising(positions: Tensor, mask: Tensor | None, segment: Tensor | None) -> None:
    """自定的位置可以跳，不可以倒退：因果性按位置判断，倒退的词元会看见后来的。"""
    real = positions >= 0
    if mask is not None:
        real = real & (mask != 0)
    for row in range(len(positions)):
        pos = positions[row][real[row]]
        stays = pos[1:] <= pos[:-1]
        if segment is not None:
            documents = segment[row][real[row]]
            stays = stays & (documents[1:] == documents[:-1])
        if bool(stays.any()):
            i = int(stays.nonzero()[0])
            raise ValueError(
                f"positions go from {int(pos[i])} to {int(pos[i + 1])} in row {row}: they must "
                "rise along a row (within a document, with segment_ids)"
            )

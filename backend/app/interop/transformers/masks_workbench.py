"""由 transformers 的掩码函数造各种图样的掩码：它们认得它的缓存、填充、打包与编译。

causal 与滑动窗口 transformers 自己说得出；别的图样作为一个附加条件与因果掩码相与。
B 批、T 本次词元数、S 键数。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)

from app.models.transformer.visibility.pattern import Pattern

from .configuration_workbench import FULL, SLIDING, WorkbenchConfig, mask_name, sliding_window

# 这些实现看我们给的掩码；别的（flash、vLLM）只认因果与滑动窗口，给了图样也会悄悄不理。
_OBEY_MASKS = ("eager", "sdpa", "flex_attention")


def build_masks(
    config: WorkbenchConfig,
    patterns: tuple[Pattern, ...],
    x: Tensor,
    attention_mask: Any,
    past: Any,
    position_ids: Tensor | None,
) -> dict[str, Any]:
    """{mask_name: 掩码}。x (B, T, …) 只看形状与类型；position_ids 只在用户给了时传。

    attention_mask 是 2D (B, S) 的填充，或已做好的：4D 的用于每一层，字典按名字取。

    Raises:
        ValueError: 选的注意力实现不看掩码，而有一层的图样要靠掩码。
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    window = sliding_window(patterns)
    implementation = config._attn_implementation
    arguments = {
        "config": config,
        "inputs_embeds": x,
        "attention_mask": attention_mask,
        "past_key_values": past,
        "position_ids": position_ids,
    }
    masks: dict[str, Any] = {}
    for pattern in dict.fromkeys(patterns):
        name = mask_name(pattern, window)
        if name == FULL:
            masks[name] = create_causal_mask(**arguments)
        elif name == SLIDING:
            masks[name] = create_sliding_window_causal_mask(**arguments)
        elif implementation in _OBEY_MASKS:
            where = _places(x, attention_mask, past, position_ids)
            masks[name] = create_causal_mask(**arguments, and_mask_function=_only(pattern, where))
        else:
            raise ValueError(
                f"attn_implementation={implementation!r} knows causal and sliding-window "
                f"attention, not attention_pattern={name!r}: use one of {_OBEY_MASKS}"
            )
    return masks


def _only(pattern: Pattern, where: Tensor | None) -> Callable[[Any, Any, Any, Any], Any]:
    """图样作为 mask_mod；where (B, S) 是各槽的位置，None = 槽号就是位置。"""

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        if where is None:
            return pattern.allow(q, k)
        return pattern.allow(where[b, q], where[b, k])

    return visible


def _places(x: Tensor, mask: Any, past: Any, position_ids: Tensor | None) -> Tensor | None:
    """各槽的位置 (B, S)。图样按位置而不按槽号看：左侧填充的一行与它单独时相同。"""
    padded = isinstance(mask, Tensor) and mask.dim() == 2
    if past is None:
        if not padded and position_ids is not None:
            # 打包时 transformers 传来的 q、k 已经是文档之内的位置。
            packed = find_packed_sequence_indices(position_ids) is not None
            return None if packed else position_ids.expand(len(x), -1)
        length = mask.shape[1] if padded else 0
    else:
        kept, offset = past.get_mask_sizes(x.shape[1], 0)
        length = kept + offset
    if padded:
        more = max(0, length - mask.shape[1])
        real = F.pad(mask.to(x.device, torch.int64), (0, more), value=1)
        return (real.cumsum(1) - 1).clamp(min=0)
    if position_ids is None:
        return None
    # 过去的位置没有记下；当作与这一次的相接。
    start = position_ids[:, :1] - past.get_seq_length()
    return (start + torch.arange(length, device=x.device)).expand(len(x), -1)


def default_positions(x: Tensor, mask: Any, past: Any) -> Tensor:
    """(B|1, T)。由填充推出，所以左侧填充的一行与它单独时相同（GPT-2 的类在这里会错）。"""
    T = x.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.to(x.device, torch.int64).cumsum(1) - 1).clamp(min=0)[:, -T:]
    seen = 0 if past is None else past.get_seq_length()
    return (torch.arange(T, device=x.device) + seen)[None]

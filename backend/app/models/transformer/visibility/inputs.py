"""对一次前向的输入的检查：错误都是一句 ValueError，点名两个值与改法。

看张量的值（词表外的 id、次序颠倒的文档）只在 CPU 上做：在加速器上读值会停下整条流水线。
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.kv_cache import KVCache
from ..config import GPT2Config
from ..layers.loss import IGNORE
from .positions import Positions


def check_call(
    config: GPT2Config,
    input_ids: Tensor,
    targets: Tensor | None,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    segment_ids: Tensor | None,
    global_attention_mask: Tensor | None,
    cache: KVCache | None,
    use_cache: bool,
    return_cache: bool,
    logits_to_keep: int,
    return_attention: tuple[int, ...],
    return_hidden: tuple[int, ...],
    return_routing: tuple[int, ...],
) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, tokens), both >= 1"
        )
    if input_ids.dtype != torch.int64:
        raise ValueError(
            f"input_ids has dtype {input_ids.dtype}, expected torch.int64: use .long()"
        )
    _same_shape("targets", targets, input_ids)
    _same_shape("attention_mask", attention_mask, input_ids)
    _same_shape("positions", positions, input_ids)
    _same_shape("segment_ids", segment_ids, input_ids)
    _same_shape("global_attention_mask", global_attention_mask, input_ids)
    if global_attention_mask is not None and not any(p.takes_marks for p in config.patterns):
        raise ValueError(
            "global_attention_mask was given but no layer has a longformer pattern "
            f"(attention_pattern={config.attention_pattern!r}): use longformer(window, n_global), "
            "or leave the mask out"
        )
    for name, tensor in (
        ("targets", targets), ("positions", positions), ("segment_ids", segment_ids),
    ):  # fmt: skip
        if tensor is not None and tensor.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.int64: use .long()")
    _check_switches(config, targets, positions, cache, use_cache, return_cache, input_ids)
    if not 0 <= logits_to_keep <= input_ids.shape[1]:
        raise ValueError(
            f"logits_to_keep={logits_to_keep} must be between 0 and the {input_ids.shape[1]} tokens"
        )
    _layers("return_attention", return_attention, config.n_layer - 1)
    _layers("return_hidden", return_hidden, config.n_layer)
    for layer in return_routing:
        if layer not in config.moe_layers:
            raise ValueError(
                f"return_routing names layer {layer}, but the MoE layers are "
                f"{list(config.moe_layers)} (moe_num_experts={config.moe_num_experts})"
            )
    if _readable(input_ids):
        _check_values(config, input_ids, targets, attention_mask, segment_ids)
        if positions is not None:
            _check_rising(positions, attention_mask, segment_ids)


def check_positions(config: GPT2Config, where: Positions) -> None:
    """学得的位置只有 context_size 个，超出必须说清，而不是下标错误。"""
    if config.position != "learned":
        return
    if where.start is not None:
        longest = where.start + where.length
    elif _readable(where.pos):
        longest = int(where.pos.max()) + 1
    else:
        return
    if longest > config.context_size:
        raise ValueError(
            f"the sequence needs {longest} positions but context_size={config.context_size}: "
            "shorten the input, or generate with overflow='slide'"
        )


def _check_switches(
    config: GPT2Config,
    targets: Tensor | None,
    positions: Tensor | None,
    cache: KVCache | None,
    use_cache: bool,
    return_cache: bool,
    input_ids: Tensor,
) -> None:
    if not use_cache and (cache is not None or return_cache):
        given = "cache" if cache is not None else "return_cache=True"
        raise ValueError(f"{given} was given with use_cache=False: pass use_cache=True as well")
    if cache is not None and cache.batch_size != input_ids.shape[0]:
        raise ValueError(
            f"the cache has {cache.batch_size} rows but input_ids has {input_ids.shape[0]}: "
            "use cache.reorder(rows) or a new cache"
        )
    if cache is not None and len(cache.keys) != config.n_layer:
        raise ValueError(
            f"the cache has {len(cache.keys)} layers but the model has n_layer={config.n_layer}: "
            "allocate it with KVCache.for_model(model.config, ...)"
        )
    if use_cache and targets is not None and torch.is_grad_enabled():
        raise ValueError(
            "targets with use_cache=True would cut gradients at the cached keys: "
            "use use_cache=False to train, or torch.no_grad() to score"
        )


def _check_values(
    config: GPT2Config,
    input_ids: Tensor,
    targets: Tensor | None,
    mask: Tensor | None,
    segment: Tensor | None,
) -> None:
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"input_ids contains {bad}, outside 0..{config.vocab_size - 1} "
            f"(vocab_size={config.vocab_size}): check that the tokenizer belongs to this model"
        )
    if targets is not None:
        wrong = targets[((targets < 0) & (targets != IGNORE)) | (targets >= config.vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"targets contains {int(wrong[0])}, neither {IGNORE} (ignored) nor in "
                f"0..{config.vocab_size - 1}"
            )
    if mask is not None:
        _check_mask(mask)
    if segment is not None:
        seen = segment if mask is None else segment.masked_fill(mask == 0, int(segment.min()))
        seen = seen if mask is None else torch.where(mask == 0, seen.cummax(1).values, seen)
        if bool((seen[:, 1:] < seen[:, :-1]).any()) or int(seen.min()) < 0:
            raise ValueError(
                "segment_ids must be >= 0 and must not decrease along a row: number the documents "
                "0, 1, 2, ... in the order in which they are packed"
            )


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


def _same_shape(name: str, tensor: Tensor | None, input_ids: Tensor) -> None:
    if tensor is not None and tensor.shape != input_ids.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but input_ids has {tuple(input_ids.shape)}"
        )


def _layers(name: str, layers: tuple[int, ...], last: int) -> None:
    for layer in layers:
        if not 0 <= layer <= last:
            raise ValueError(f"{name} names layer {layer}, but layers here go from 0 to {last}")


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()

"""一份配置占多大：各部分的参数量、键值缓存的字节数。都不分配内存。"""

from __future__ import annotations

import math
from dataclasses import dataclass

from app.models.transformer.cache.kv_cache import KVCache
from app.models.transformer.cache.kv_dtype import KVDtype
from app.models.transformer.config import GPT2Config
from app.models.transformer.model import GPT2Model
from app.models.transformer.weights.own_folder import expected_shapes

PARTS = ("embedding", "attention", "mlp", "router", "experts", "norms", "head")
# 随权重存取而不训练的张量。
BUFFERS = ("selection_bias",)
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class CacheSize:
    """一行在一层里占的：能放几个词元，多少字节。"""

    slots: int
    nbytes: int


def parameters_by_part(config: GPT2Config) -> dict[str, int]:
    """{部分: 参数量}，按 PARTS 的次序；没有的部分（共享权重时的 head、没有专家）是 0。"""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in parameter_shapes(config).items():
        counts[_part(name)] += math.prod(shape)
    return counts


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """expected_shapes 里会训练的那些。"""
    return {
        name: shape
        for name, shape in expected_shapes(GPT2Model, config).items()
        if not name.endswith(BUFFERS)
    }


def active_parameters(config: GPT2Config) -> int:
    """一个词元用到的参数量；等于 GPT2Model.active_parameters。"""
    counts = parameters_by_part(config)
    experts = counts.get("experts", 0)
    used = experts * config.moe_top_k // config.moe_num_experts if experts else 0
    return sum(counts.values()) - experts + used


def cache_sizes(config: GPT2Config, length: int, kv_dtype: KVDtype = None) -> tuple[CacheSize, ...]:
    """每层一个：一行、至多 length 个词元，默认的 max_chunk。

    Raises:
        ValueError: 学得的位置没有这么长。
    """
    patterns = tuple(dict.fromkeys(config.patterns))
    # 同一图样的层一样大，所以每种只在 meta 设备上造一层。
    one_each = config.dense().replace(
        n_layer=len(patterns),
        attention_pattern=tuple(map(str, patterns)),
        use_sparse_attention=False,
    )
    cache = KVCache.for_model(one_each, 1, length, kv_dtype=kv_dtype, device="meta")
    sizes = {
        pattern: CacheSize(keys.shape[2] - 1, sum(store.nbytes for store in pair))
        for pattern, keys, pair in zip(patterns, cache.keys, cache.stores, strict=True)
    }
    return tuple(sizes[pattern] for pattern in config.patterns)


def _part(name: str) -> str:
    words = name.split(".")
    if words[0] == "lm_head":
        return "head"
    if words[0] == "embed":
        return "embedding"
    if any(word.startswith("ln_") or word.endswith("_norm") for word in words):
        return "norms"
    if words[3] in ("router", "experts"):
        return "router" if words[3] == "router" else "experts"
    return {"attn": "attention", "mlp": "mlp"}[words[2]]

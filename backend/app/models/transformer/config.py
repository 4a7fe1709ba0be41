"""模型配置：一个冻结的数据类，不依赖 torch，任何错误都点名两个值和改法。

字段名沿用 GPT-2；每个开关要么与其它开关可任意组合，要么在这里带着理由被拒绝。
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from .settings.fields import Mark, check_bounds, nearest, normalise_types
from .settings.json_file import read_json
from .settings.moe_config import MoEConfig
from .settings.rope_config import RoPEConfig
from .visibility.pattern import CAUSAL, Pattern
from .visibility.pattern_fit import check_pattern
from .visibility.pattern_text import canonical, parse

SCHEMA_VERSION = 1
# 字段相同，而旁边的权重是量化的：只认得 1 的旧程序因此说得出为什么读不了。
QUANTIZED_VERSION = 2

Norm = Literal["post", "pre", "deepnorm", "keel"]
NormType = Literal["layernorm", "rmsnorm"]
Position = Literal["learned", "rope", "none"]
Activation = Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu", "silu"]
# 有门的：c_fc 是门与值两个矩阵拼成的。式子在 mlp.py；加一种激活只动这两个文件。
GATED: frozenset[Activation] = frozenset({"swiglu"})
Backend = Literal["auto", "reference", "sdpa", "blocked", "flex"]

# 上界只为在分配内存之前挡住荒唐的配置文件（GPT-3 175B 也远在其内）。
_MOST_LAYERS = 4096
_BOUNDS = {
    "vocab_size": (1, 10_000_000),
    "context_size": (1, 10_000_000),
    "n_layer": (1, _MOST_LAYERS),
    "n_head": (1, 4096),
    "n_embed": (1, 262_144),
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """GPT-2 形状的解码器配置（Radford et al. 2019，表 2）。

    Raises:
        ValueError: 值越界、两个值互相矛盾，或开关对应的部件尚不存在。
    """

    vocab_size: Annotated[int, Doc("number of token ids")] = 50304
    context_size: Annotated[int, Doc("longest sequence, in tokens")] = 1024
    n_layer: Annotated[int, Doc("number of blocks")] = 12
    n_head: Annotated[int, Doc("number of query heads")] = 12
    n_embed: Annotated[int, Doc("width of the residual stream")] = 768
    dropout: Annotated[
        float, Doc("dropout on embeddings, attention weights and branches"), Mark.FREE
    ] = 0.1
    bias: Annotated[bool, Doc("biases in linear layers and LayerNorms")] = True
    norm: Annotated[Norm, Doc("where the norms sit; 'pre' is GPT-2, 'keel' trains deep")] = "post"
    norm_type: Annotated[NormType, Doc("layernorm or rmsnorm")] = "layernorm"
    position: Annotated[Position, Doc("learned positions, rotary, or none")] = "learned"
    rope: Annotated[RoPEConfig, Doc("rotary positions; used with position='rope'")] = RoPEConfig()
    tie_weights: Annotated[bool, Doc("head shares the token embedding's weight")] = True
    n_kv_head: Annotated[int | None, Doc("key/value heads (grouped-query); None = n_head")] = None
    activation: Annotated[Activation, Doc("activation of the MLP")] = "gelu_tanh"
    qk_norm: Annotated[bool, Doc("RMS-normalise queries and keys per head")] = False
    use_sparse_attention: Annotated[
        bool, Doc("without attention_pattern: local(context_size / 4) | global(16)")
    ] = False
    attention_pattern: Annotated[
        str | tuple[str, ...] | None,
        Doc(
            "which keys a query sees, e.g. 'local(256) | global(16)'; several are a cycle over "
            "the layers: 'local(256)' causal; None = causal"
        ),
    ] = None
    moe_num_experts: Annotated[int, Doc("experts per MoE layer; 0 = dense MLP")] = 0
    moe_top_k: Annotated[int, Doc("experts per token")] = 2
    moe: Annotated[MoEConfig, Doc("router, balance, layers; used with moe_num_experts")] = (
        MoEConfig()
    )
    attention_backend: Annotated[Backend, Doc("attention implementation"), Mark.FREE] = "auto"

    def __post_init__(self) -> None:
        pattern = canonical(self.attention_pattern, _MOST_LAYERS)
        object.__setattr__(self, "attention_pattern", pattern)
        normalise_types(self)
        check_bounds(self, _BOUNDS)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.n_embed % self.n_head:
            raise ValueError(
                f"n_embed={self.n_embed} is not a multiple of n_head={self.n_head}: "
                f"use n_embed={max(1, round(self.n_embed / self.n_head)) * self.n_head} "
                "or another n_head"
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(
                f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}: "
                "use None (= n_head) or a divisor"
            )
        self._check_experts()
        self._check_rope()
        self._check_patterns()

    def _check_experts(self) -> None:
        experts, k = self.moe_num_experts, self.moe_top_k
        if k < 1:
            raise ValueError(f"moe_top_k={k} must be at least 1")
        if experts == 0:
            self.moe.check_unused(k)
            return
        self.moe.check_fits(
            experts,
            k,
            n_layer=self.n_layer,
            mlp_hidden=self.mlp_hidden,
            context_size=self.context_size,
        )

    def _check_rope(self) -> None:
        if self.position != "rope":
            if self.rope != RoPEConfig():
                raise ValueError(
                    f"rope={self.rope} has no effect with position={self.position!r}: "
                    "use position='rope', or leave rope out"
                )
        elif self.head_dim % 2:
            raise ValueError(
                f"position='rope' turns pairs, but n_embed={self.n_embed} / n_head={self.n_head} "
                f"gives heads of width {self.head_dim}: use an even width"
            )

    def _check_patterns(self) -> None:
        given = self.attention_pattern
        if isinstance(given, tuple) and len(given) > self.n_layer:
            raise ValueError(
                f"attention_pattern has a cycle of {len(given)} patterns but n_layer="
                f"{self.n_layer}: use at most {self.n_layer} patterns or more layers"
            )
        if self.use_sparse_attention and not self.is_sparse:
            raise ValueError(
                f"use_sparse_attention=True but attention_pattern={given!r} is causal in every "
                "layer: use use_sparse_attention=False or a sparse attention_pattern"
            )
        for pattern in dict.fromkeys(self.patterns):
            try:
                check_pattern(pattern, self.context_size)
            except ValueError as error:
                raise ValueError(f"attention_pattern={str(pattern)!r}: {error}") from None

    @property
    def head_dim(self) -> int:
        return self.n_embed // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """每层一个图样，长 n_layer；给出的几个依次循环。

        只有 use_sparse_attention 时取 local(context_size / 4) | global(16)：窗口管邻近的句法，
        前缀留住主题词。不取 strided，它不合文字：enwik8 上每字节 1.13 比特，稠密 1.00、
        fixed 0.99（Child et al. 2019, arXiv:1904.10509, 表 2）。
        """
        given = self.attention_pattern
        if given is None and self.use_sparse_attention:
            context = self.context_size
            given = f"local({max(1, context // 4)}) | global({min(16, context)})"
        texts = (given or str(CAUSAL),) if not isinstance(given, tuple) else given
        return tuple(parse(texts[layer % len(texts)]) for layer in range(self.n_layer))

    @property
    def is_sparse(self) -> bool:
        """有一层不是完全因果。"""
        return any(pattern != CAUSAL for pattern in self.patterns)

    @property
    def is_gated(self) -> bool:
        """前馈的激活有门。"""
        return self.activation in GATED

    @property
    def has_final_norm(self) -> bool:
        """只有 pre 的残差流从不归一化，所以最后一层之后另有一个归一化。"""
        return self.norm == "pre"

    @property
    def mlp_hidden(self) -> int:
        """GPT-2 的 4·n_embed；有门的有三个矩阵，取 8/3（对齐 64）使参数量相当。

        来源：Shazeer 2020, arXiv:2002.05202, 第 3 节。
        """
        if self.is_gated:
            return -(-8 * self.n_embed // (3 * 64)) * 64
        return 4 * self.n_embed

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """哪些层的前馈是混合专家。"""
        return self.moe.layers_among(self.n_layer) if self.moe_num_experts else ()

    @property
    def expert_hidden(self) -> int:
        """一个路由专家的宽度。"""
        return self.moe.width(self.moe_top_k, self.mlp_hidden)

    @property
    def shared_hidden(self) -> int:
        """各共享专家的宽度之和：并排的几个专家就是一个宽的前馈。"""
        each = self.expert_hidden if self.moe.shared_hidden is None else self.moe.shared_hidden
        return self.moe.shared_experts * each

    def with_layers(self, n_layer: int, moe_layers: Iterable[int] | None = None) -> GPT2Config:
        """换成更少的层数；哪些是 MoE 照 moe_layers，或照原来的（一层也不剩时取最后一层）。"""
        if not self.moe_layers:
            return self.replace(n_layer=n_layer)
        kept = tuple(i for i in self.moe_layers if i < n_layer) or (n_layer - 1,)
        chosen = kept if moe_layers is None else tuple(moe_layers)
        moe = dataclasses.replace(self.moe, layers=chosen, every=1, first_dense=0)
        return self.replace(n_layer=n_layer, moe=moe)

    def dense(self) -> GPT2Config:
        """同样的形状，前馈都是稠密的。"""
        return self.replace(moe_num_experts=0, moe_top_k=2, moe=MoEConfig())

    def replace(self, **changes: Any) -> GPT2Config:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        data = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        data["moe"] = self.moe.to_dict()
        if isinstance(self.attention_pattern, tuple):
            data["attention_pattern"] = list(self.attention_pattern)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GPT2Config:
        """从字典恢复。

        Raises:
            ValueError: 未知的键（给出最近的名字）、未来的 schema_version，或坏值。
        """
        if not isinstance(data, dict):
            raise ValueError(f"a model config is a mapping, got {type(data).__name__}")
        data = dict(data)
        version = data.pop("schema_version", SCHEMA_VERSION)
        if version not in (SCHEMA_VERSION, QUANTIZED_VERSION):
            raise ValueError(
                f"schema_version={version!r} but this version reads {SCHEMA_VERSION} and "
                f"{QUANTIZED_VERSION}: update the package or save the model again with it"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"unknown model option {key!r}{nearest(str(key), known)}")
        for key, kind in (("rope", RoPEConfig), ("moe", MoEConfig)):
            if key in data and not isinstance(data[key], kind):
                data[key] = kind.from_dict(data[key])
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> GPT2Config:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model config is not valid JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def from_file(cls, path: Path) -> GPT2Config:
        """读一个 JSON 文件；错误里带上文件名。

        Raises:
            ValueError: 没有这个文件、大得不像配置、不是 UTF-8 或 JSON，或内容不对。
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

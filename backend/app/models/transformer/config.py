"""模型配置：一个冻结的数据类，不依赖 torch，任何错误都点名两个值和改法。

字段名沿用 GPT-2；每个开关要么与其它开关可任意组合，要么在这里带着理由被拒绝。
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from typing_extensions import Doc

SCHEMA_VERSION = 1
_MAX_FILE_BYTES = 1 << 20

Norm = Literal["post", "pre", "deepnorm", "keel"]
NormType = Literal["layernorm", "rmsnorm"]
Position = Literal["learned", "rope", "none"]
Activation = Literal["gelu_tanh", "gelu", "relu2", "swiglu", "silu"]
Backend = Literal["auto", "reference", "sdpa", "blocked", "flex"]

# 上界只为在分配内存之前挡住荒唐的配置文件（GPT-3 175B 也远在其内）。
_UPPER = {
    "vocab_size": 10_000_000,
    "context_size": 10_000_000,
    "n_layer": 4096,
    "n_head": 4096,
    "n_embed": 262_144,
}

# 契约里已定名、但部件还没有建成的选项：宁可拒绝，不可忽略。
_NOT_BUILT = {
    ("position", "rope"): "use position='learned' or 'none'",
    ("attention_backend", "blocked"): "use attention_backend='auto', 'sdpa' or 'reference'",
    ("attention_backend", "flex"): "use attention_backend='auto', 'sdpa' or 'reference'",
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
    dropout: Annotated[float, Doc("dropout on embeddings, attention weights and branches")] = 0.1
    bias: Annotated[bool, Doc("biases in linear layers and LayerNorms")] = True
    norm: Annotated[Norm, Doc("where the norms sit; 'pre' is GPT-2, 'keel' trains deep")] = "post"
    norm_type: Annotated[NormType, Doc("layernorm or rmsnorm")] = "layernorm"
    position: Annotated[Position, Doc("learned positions, or none")] = "learned"
    tie_weights: Annotated[bool, Doc("head shares the token embedding's weight")] = True
    n_kv_head: Annotated[int | None, Doc("key/value heads (grouped-query); None = n_head")] = None
    activation: Annotated[Activation, Doc("activation of the MLP")] = "gelu_tanh"
    qk_norm: Annotated[bool, Doc("RMS-normalise queries and keys per head")] = False
    use_sparse_attention: Annotated[bool, Doc("sparse attention with the default pattern")] = False
    attention_pattern: Annotated[str | None, Doc("attention pattern; None = causal")] = None
    moe_num_experts: Annotated[int, Doc("experts per MoE layer; 0 = dense MLP")] = 0
    moe_top_k: Annotated[int, Doc("experts per token")] = 2
    attention_backend: Annotated[Backend, Doc("attention implementation")] = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        for name, upper in _UPPER.items():
            value = getattr(self, name)
            if not 1 <= value <= upper:
                raise ValueError(f"{name}={value} must be between 1 and {upper}")
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
        if self.moe_top_k < 1:
            raise ValueError(f"moe_top_k={self.moe_top_k} must be at least 1")
        self._check_built()

    def _check_types(self) -> None:
        """YAML 与 JSON 会送来错类型；数据类本身不检查，所以在这里检查。"""
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            allowed = get_args(kind) or (kind,)
            if isinstance(allowed[0], str):
                if value not in allowed:
                    raise ValueError(f"{field.name}={value!r} is not one of {list(allowed)}")
                continue
            if float in allowed and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
                continue
            if type(value) not in allowed:
                wanted = " or ".join(t.__name__ for t in allowed)
                raise ValueError(
                    f"{field.name}={value!r} has type {type(value).__name__}, expected {wanted}"
                )

    def _check_built(self) -> None:
        for (name, value), fix in _NOT_BUILT.items():
            if getattr(self, name) == value:
                raise ValueError(f"{name}={value!r} is not available in this version: {fix}")
        if self.use_sparse_attention or self.attention_pattern is not None:
            raise ValueError(
                f"use_sparse_attention={self.use_sparse_attention}, "
                f"attention_pattern={self.attention_pattern!r}: sparse attention is not available "
                "in this version: use use_sparse_attention=False and attention_pattern=None"
            )
        if self.moe_num_experts != 0:
            raise ValueError(
                f"moe_num_experts={self.moe_num_experts}: mixture of experts is not available "
                "in this version: use moe_num_experts=0"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embed // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def mlp_hidden(self) -> int:
        """GPT-2 的 4·n_embed；swiglu 有三个矩阵，取 8/3（对齐 64）使参数量相当。

        来源：Shazeer 2020, arXiv:2002.05202, 第 3 节。
        """
        if self.activation == "swiglu":
            return -(-8 * self.n_embed // (3 * 64)) * 64
        return 4 * self.n_embed

    def replace(self, **changes: Any) -> GPT2Config:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

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
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version={version!r} but this version reads {SCHEMA_VERSION}: "
                "update the package or save the model again with it"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"unknown model option {key!r}{nearest(str(key), known)}")
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
            ValueError: 文件大得不像配置、不是 UTF-8，或内容不对。
        """
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, more than {_MAX_FILE_BYTES}: "
                "this is no model config"
            )
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def nearest(name: str, known: list[str]) -> str:
    """报错的尾巴：最接近的合法名字，没有就列出全部。"""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"

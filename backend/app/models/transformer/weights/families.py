"""别家的 config.json 与 GPT2Config 互换：也是表，两个方向查同一张。不需要 torch。

没有对应物的值不悄悄丢掉：错误点名两个值与改法。只与训练有关的（各处不同的 dropout、layerdrop）
不影响权重的意思，取残差处的 dropout。
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Activation, GPT2Config, Norm
from ..settings.fields import short
from .mixtral import not_mixtral, read_mixtral, write_mixtral

# Hugging Face 的激活名；写出用第一个对得上的。
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
# GPT-1 的 "gelu" 就是 tanh 近似式（OpenAIGPT 的 ACT_FNS）。
_GPT1_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# 要执行文件夹里的代码、或权重另有打包的，一概不认；代码从不运行，连问也不问。
_NEVER: dict[str, tuple[Any, str]] = {
    "auto_map": (None, "it brings its own code, which is never run here"),
    "quantization_config": (None, "its weights are packed; export them unquantized"),
    "pruned_heads": ({}, "some heads were cut out"),
    "is_encoder_decoder": (False, "it has an encoder"),
    "add_cross_attention": (False, "it attends to an encoder"),
}
# 扩过词表的导出（见 interop 的 padding）在这里记下原来的行数，读回时去掉多出的。
VOCAB_KEY = "trained_vocab_size"
# 我们自带代码的 transformers 模型（app.interop.transformers）。
OWN_TYPE = "gpt2-workbench"


# 这几种以外的部件；is_sparse 由图样推出，读的时候不必给。
_PLAIN: dict[str, Any] = {
    "norm_type": "layernorm",
    "position": "learned",
    "qk_norm": False,
    "moe_num_experts": 0,
    "is_sparse": False,
}


@dataclass(frozen=True)
class Family:
    """一种 Hugging Face 模型的配置。

    Attributes:
        norms: norm_key 的值 -> 归一化的位置；norm_key 为 None 则只有一种。
        sizes: 我们的字段 -> (对方的键, 对方的默认值)。
        dropouts: 全部 dropout 的键；第一个是残差处的。
        hidden: 前馈层宽度的键，对方的默认值；None = 恒为 4 倍。
        fixed: 必须是这个值的键：(值, 别的值意味着什么)。
        plain: 我们的字段只有这个值有对应物。
        tied: 没有写明时，输出头与词嵌入是否共享。
        nested: 成组的设置（rope、moe），两个方向各一个函数；None = 没有。
    """

    model_type: str
    architecture: str
    norms: Mapping[Any, Norm]
    sizes: Mapping[str, tuple[str, int]]
    dropouts: tuple[str, ...]
    activation: tuple[str, str]
    norm_key: str | None = None
    activations: Mapping[str, Activation] = field(default_factory=lambda: _ACTIVATIONS)
    hidden: tuple[str, int | None] | None = None
    fixed: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=lambda: _PLAIN)
    tied: bool = True
    nested: Nested | None = None

    @property
    def norm_names(self) -> list[str]:
        return [repr(norm) for norm in self.norms.values()]


@dataclass(frozen=True)
class Nested:
    """read(对方的) -> 我们的字段；write(我们的) -> 对方的键；why_not(我们的) -> 原因。"""

    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[GPT2Config], dict[str, Any]]
    why_not: Callable[[GPT2Config], str | None]


def _sizes(vocab: int, context: int, names: str) -> dict[str, tuple[str, int]]:
    context_key, layer, head, embed = names.split()
    return {
        "vocab_size": ("vocab_size", vocab),
        "context_size": (context_key, context),
        "n_layer": (layer, 12),
        "n_head": (head, 12),
        "n_embed": (embed, 768),
    }


_EPSILON = (1e-5, "another epsilon in the LayerNorms; here it is 1e-5")

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    norms={None: "pre"},
    sizes=_sizes(50257, 1024, "n_positions n_layer n_head n_embd"),
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    activation=("activation_function", "gelu_new"),
    hidden=("n_inner", None),
    fixed={
        "layer_norm_epsilon": _EPSILON,
        "scale_attn_weights": (True, "attention without 1/sqrt(head width)"),
        "scale_attn_by_inverse_layer_idx": (False, "attention scaled by the layer's number"),
    },
)
OPENAI_GPT = Family(
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    norms={None: "post"},
    sizes=_sizes(40478, 512, "n_positions n_layer n_head n_embd"),
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    activation=("afn", "gelu"),
    activations=_GPT1_ACTIVATIONS,
    fixed={"layer_norm_epsilon": _EPSILON},
)
OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    norm_key="do_layer_norm_before",
    norms={True: "pre", False: "post"},
    sizes=_sizes(
        50272, 2048, "max_position_embeddings num_hidden_layers num_attention_heads hidden_size"
    ),
    dropouts=("dropout", "attention_dropout"),
    activation=("activation_function", "relu"),
    hidden=("ffn_dim", 3072),
    fixed={
        "enable_bias": (True, "linear layers without biases beside LayerNorms with them"),
        "layer_norm_elementwise_affine": (True, "LayerNorms without weights"),
        "_remove_final_layer_norm": (False, "no final LayerNorm although norm='pre'"),
    },
)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    norms={None: "pre"},
    sizes={
        "vocab_size": ("vocab_size", 32000),
        "context_size": ("max_position_embeddings", 131072),
        "n_layer": ("num_hidden_layers", 32),
        "n_head": ("num_attention_heads", 32),
        "n_embed": ("hidden_size", 4096),
        "n_kv_head": ("num_key_value_heads", 8),
        "moe_num_experts": ("num_local_experts", 8),
        "moe_top_k": ("num_experts_per_tok", 2),
    },
    dropouts=("attention_dropout",),
    activation=("hidden_act", "silu"),
    # 门控的 SiLU 就是 SwiGLU。
    activations={"silu": "swiglu", "swish": "swiglu"},
    fixed={
        "rms_norm_eps": (1e-5, "another epsilon in the RMSNorms; here it is 1e-5"),
        "sliding_window": (None, "attention within a window"),
    },
    plain={
        "norm_type": "rmsnorm",
        "position": "rope",
        "bias": False,
        "qk_norm": False,
        "is_sparse": False,
    },
    tied=False,
    nested=Nested(read_mixtral, write_mixtral, not_mixtral),
)
FAMILIES = {family.model_type: family for family in (GPT2, OPENAI_GPT, OPT, MIXTRAL)}


def family_of(raw: Any, where: str) -> Family:
    """
    Raises:
        ValueError: 不是映射，或这种模型没有表。
    """
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{where}: model_type={kind!r} cannot be read; known are {', '.join(FAMILIES)}, "
            "and folders written by save_pretrained"
        )
    return FAMILIES[kind]


def read_config(raw: dict[str, Any], where: str) -> GPT2Config:
    """对方的 config.json 译成我们的；不认识的键（各种元数据）不看。

    vocab_size 是文件里的行数，其中有用的见 extra_vocab。我们自带代码的那种直接取字段：
    文件夹里的代码（auto_map）从不运行。

    Raises:
        ValueError: 有值没有对应物，或越界；点名键、值与原因。
    """
    if raw.get("model_type") == OWN_TYPE:
        return _read_own(raw, where)
    family = family_of(raw, where)
    for key, (value, meaning) in {**_NEVER, **family.fixed}.items():
        given = raw.get(key, value)
        if given != value and not (given is None and key in _NEVER):
            raise ValueError(
                f"{where}: {key}={short(given)} means {meaning}; {family.model_type} is read with "
                f"{key}={value!r} only"
            )
    values: dict[str, Any] = {
        ours: raw.get(key, default) for ours, (key, default) in family.sizes.items()
    }
    values |= {
        "norm": _look_up(raw, family.norm_key, True, family.norms, where),
        "activation": _look_up(raw, *family.activation, family.activations, where),
        "dropout": raw.get(family.dropouts[0], 0.1),
        "tie_weights": raw.get("tie_word_embeddings", family.tied),
    }
    if family.nested is not None:
        values |= {name: value for name, value in family.plain.items() if name != "is_sparse"}
    try:
        if family.nested is not None:
            values |= family.nested.read(raw)
        config = GPT2Config(**values)
    except (ValueError, TypeError) as error:
        keys = ", ".join(f"{ours} is their {key}" for ours, (key, _) in family.sizes.items())
        raise ValueError(f"{where}: {error} ({keys})") from None
    _check_widths(raw, family, config, where)
    return config


def _read_own(raw: dict[str, Any], where: str) -> GPT2Config:
    names = ("schema_version", *(field.name for field in dataclasses.fields(GPT2Config)))
    try:
        return GPT2Config.from_dict({name: raw[name] for name in names if name in raw})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def extra_vocab(raw: dict[str, Any], config: GPT2Config, where: str) -> int:
    """为对方的运行时补在词表末尾的行数。

    Raises:
        ValueError: 记下的原词表比现在的还大，或不是正整数。
    """
    trained = raw.get(VOCAB_KEY, config.vocab_size)
    if type(trained) is not int or not 1 <= trained <= config.vocab_size:
        raise ValueError(
            f"{where}: {VOCAB_KEY}={short(trained)} must be between 1 and "
            f"vocab_size={config.vocab_size}"
        )
    return config.vocab_size - trained


def _look_up(
    raw: dict[str, Any], key: str | None, default: Any, table: Mapping[Any, str], where: str
) -> str:
    if key is None:
        return table[None]
    given = raw.get(key, default)
    if not isinstance(given, str | bool) or given not in table:
        known = ", ".join(str(name) for name in table)
        raise ValueError(f"{where}: {key}={short(given)} is not one of {known}")
    return table[given]


def _check_widths(raw: dict[str, Any], family: Family, config: GPT2Config, where: str) -> None:
    width = 4 * config.n_embed
    if family.hidden is not None:
        key, default = family.hidden
        given = raw.get(key, default)
        if given is not None and given != width:
            raise ValueError(
                f"{where}: {key}={short(given)} but here the MLP is always 4 times "
                f"{family.sizes['n_embed'][0]}={config.n_embed}, {width} wide"
            )
    projected = raw.get("word_embed_proj_dim")
    if projected is not None and projected != config.n_embed:
        raise ValueError(
            f"{where}: word_embed_proj_dim={short(projected)} with hidden_size={config.n_embed} "
            "puts projections around the blocks (opt-350m); only equal widths can be read"
        )


def why_not(family: Family, config: GPT2Config) -> str | None:
    """这份配置为什么写不成那种模型；None = 写得成。"""
    if config.norm not in family.norms.values():
        return f"norm={config.norm!r} but {family.model_type} has {' or '.join(family.norm_names)}"
    if config.activation not in family.activations.values():
        return f"activation={config.activation!r} does not exist in {family.model_type}"
    if not config.moe_num_experts and "moe_num_experts" in family.sizes:
        return f"moe_num_experts=0 but {family.model_type} has experts in every layer"
    plain = dict(family.plain)
    if "n_kv_head" not in family.sizes:
        plain["kv_heads"] = config.n_head
    for name, value in plain.items():
        if getattr(config, name) != value:
            return (
                f"{_shown(name)}={getattr(config, name)!r} but {family.model_type} has only "
                f"{_shown(name)}={value!r}"
            )
    if family.nested is not None:
        return family.nested.why_not(config)
    return None


def write_config(family: Family, config: GPT2Config) -> dict[str, Any]:
    """译成对方的 config.json；read_config 的逆（dropout 各处都写同一个值）。

    Raises:
        ValueError: 写不成，见 why_not。
    """
    reason = why_not(family, config)
    if reason is not None:
        raise ValueError(reason)
    key, _ = family.activation
    activations: dict[Activation, str] = {}
    for theirs, ours in family.activations.items():
        activations.setdefault(ours, theirs)
    raw: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **{theirs: getattr(config, ours) for ours, (theirs, _) in family.sizes.items()},
        **dict.fromkeys(family.dropouts, config.dropout),
        **{name: value for name, (value, _) in family.fixed.items()},
        key: activations[config.activation],
        "tie_word_embeddings": config.tie_weights,
    }
    if family.hidden is not None:
        raw[family.hidden[0]] = 4 * config.n_embed
    if family.nested is not None:
        raw |= family.nested.write(config) | {"num_key_value_heads": config.kv_heads}
    if family.norm_key is not None:
        raw[family.norm_key] = next(k for k, norm in family.norms.items() if norm == config.norm)
    return raw


def _shown(name: str) -> str:
    return {"kv_heads": "n_kv_head", "is_sparse": "sparse attention"}.get(name, name)

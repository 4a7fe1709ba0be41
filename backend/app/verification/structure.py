"""与具体配置无关的检查：文件、组件、配置、工厂。"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

import app.models.transformer as transformer
from app.models.transformer import GPT2Config, GPT2Model
from app.verification.said import Result, Said, tally

FILES = ("__init__", "config", "attention", "mlp", "block", "embeddings", "model", "factory")

DEFAULTS = {
    "vocab_size": 50304,
    "context_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embed": 768,
    "dropout": 0.1,
    "bias": True,
    "norm": "post",
    "tie_weights": True,
    "use_sparse_attention": False,
    "moe_num_experts": 0,
    "moe_top_k": 2,
}

# 共享权重、norm="pre" 的参数量，与 transformers 的 GPT2LMHeadModel 逐个相同；
# "post" 没有末尾的归一化，少 2·n_embed。
COUNTS = {
    "small": {50257: 124_439_808, 50304: 124_475_904, 1000: 86_610_432},
    "medium": {50257: 354_823_168, 50304: 354_871_296, 1000: 304_384_000},
    "large": {50257: 774_030_080, 50304: 774_090_240, 1000: 710_981_120},
    "xl": {50257: 1_557_611_200, 50304: 1_557_686_400, 1000: 1_478_800_000},
}
_EXAMPLE = f"small/50257/pre {COUNTS['small'][50257]:,}"

BAD_CONFIGS: tuple[tuple[dict[str, object], str], ...] = (
    ({"n_head": 7}, "n_head=7"),
    ({"n_layer": 0}, "n_layer=0"),
    ({"dropout": 1.5}, "dropout=1.5"),
    ({"vocab_size": "many"}, "vocab_size='many'"),
    ({"norm": "middle"}, "norm='middle'"),
    ({"n_kv_head": 5}, "n_kv_head=5"),
    ({"n_layers": 3}, "did you mean 'n_layer'"),
    ({"moe_num_experts": -1}, "moe_num_experts=-1"),
)


def check_files() -> Result:
    folder = Path(str(transformer.__file__)).parent
    missing = [f"{name}.py" for name in FILES if not (folder / f"{name}.py").is_file()]
    return not missing, tally(len(FILES), missing, Said("files", "个文件"))


def check_components() -> Result:
    """公开的名字都取得到；四种归一化位置的模型都由同样的部件组成。"""
    missing = [name for name in transformer.__all__ if not hasattr(transformer, name)]
    parts = {"attention": "Attention", "mlp": "MLP", "block": "Block", "embeddings": "Embeddings"}
    classes = {
        name: getattr(import_module(f"app.models.transformer.{file}"), name)
        for file, name in parts.items()
    }
    with torch.device("meta"):
        model = GPT2Model(GPT2Config(n_layer=3))
    found = {
        name: sum(isinstance(m, kind) for m in model.modules()) for name, kind in classes.items()
    }
    wanted = {"Attention": 3, "MLP": 3, "Block": 3, "Embeddings": 1}
    public = Said("public names", "个公开的名字")
    counts = ", ".join(f"{count} {name}" for name, count in found.items())
    figure = tally(len(transformer.__all__), missing, public).join(
        Said(f"a model of 3 layers has {counts}", f"3 层模型有 {counts}")
    )
    return not missing and found == wanted, figure


def check_config() -> Result:
    config = GPT2Config()
    wrong = [name for name, value in DEFAULTS.items() if getattr(config, name) != value]
    other = GPT2Config(vocab_size=11, n_layer=2, n_head=4, n_kv_head=2, n_embed=16, norm="keel")
    same = all(
        GPT2Config.from_json(c.to_json()) == c == GPT2Config.from_dict(json.loads(c.to_json()))
        for c in (config, other)
    )
    accepted = [fragment for data, fragment in BAD_CONFIGS if not _refuses(data, fragment)]
    figure = (
        tally(len(DEFAULTS), wrong, Said("defaults", "个默认值"))
        .join(
            Said(
                f"to JSON and back {'equal' if same else 'different'}",
                f"往返{'相同' if same else '不同'}",
            )
        )
        .join(
            tally(
                len(BAD_CONFIGS), accepted, Said("bad values refused by name", "个坏值被点名拒绝")
            )
        )
    )
    return not wrong and same and not accepted, figure


def check_factories() -> Result:
    """四个预设 × 三个词表 × pre/post，在 meta 设备上数。"""
    wrong, total = [], 0
    for preset, by_vocab in COUNTS.items():
        create: Callable[..., GPT2Model] = getattr(transformer, f"create_gpt2_{preset}")
        for vocab, pre in by_vocab.items():
            for norm in ("pre", "post"):
                with torch.device("meta"):
                    model = create(vocab_size=vocab, norm=norm)
                wanted = pre if model.config.has_final_norm else pre - 2 * model.config.n_embed
                total += 1
                if model.num_parameters() != wanted:
                    wrong.append(f"{preset}/{vocab}/{norm} {model.num_parameters():,}≠{wanted:,}")
    figure = tally(total, wrong, Said("parameter counts exact", "个参数量逐个相同"))
    return not wrong, figure.join(Said(_EXAMPLE, _EXAMPLE))


def _refuses(data: dict[str, object], fragment: str) -> bool:
    try:
        GPT2Config.from_dict(data)
    except ValueError as error:
        return fragment in str(error)
    return False

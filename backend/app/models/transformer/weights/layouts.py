"""别家的张量叫什么、怎样存：一张表，读进来与写出去都查它，没有流程。

GPT-1 与 GPT-2 的 Conv1D 存 (in, out)，这里的 Linear 存 (out, in)：四个矩阵要转置；
attn.c_proj 是方阵，漏转置不会报错。OPT 的位置嵌入前面多两行（fairseq 的 padding_idx + 1）。
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import GPT2Config
from ..layers.fused import parts_of
from .safetensors_file import TensorSource

HEAD = "lm_head.weight"
_VOCAB = ("embed.wte.weight", HEAD)
_LAYER = re.compile(r"h\.(\d+)\.(.*)")
# DDP 与 torch.compile 给每个名字套上的。
_WRAPPED = re.compile(r"(?:module\.|_orig_mod\.)*")


@dataclass(frozen=True)
class Row:
    """表的一行。

    Attributes:
        theirs: 对方的名字（不含 .weight/.bias）；几个 = 沿第 0 维相接成我们的一个。有 {e} 的是
            一个专家的，各专家叠成我们的第 0 维。
        transpose: 对方的矩阵存 (in, out)。
        skip: 对方在前面多出的行数，没有内容。
    """

    theirs: tuple[str, ...]
    transpose: bool = False
    skip: int = 0

    @property
    def stacked(self) -> bool:
        return "{e}" in self.theirs[0]

    def rows(self, ours: str, rows: int, config: GPT2Config) -> list[int]:
        """我们的 rows 行（一个专家的）里，theirs 各占几行：对方分开的正是我们拼成的那几部分。"""
        if len(self.theirs) == 1:
            return [rows]
        return list(parts_of(ours, rows, config).values())


def _rows(table: Mapping[str, str], conv1d: bool = False) -> dict[str, Row]:
    matrices = ("c_attn", "c_proj", "c_fc")
    return {
        ours: Row((theirs,), transpose=conv1d and ours.endswith(matrices))
        for ours, theirs in table.items()
    }


@dataclass(frozen=True)
class Layout:
    """一种存法。

    Attributes:
        prefixes: 对方名字的前缀；写出用第一个，读入认任何一个。
        rows: 我们的名字 -> 表的一行；None = 名字与存法都是我们的。
        ignored: 文件里可以有、与计算无关的张量（旧文件把掩码也存了）。
    """

    prefixes: tuple[str, ...]
    rows: Mapping[str, Row] | None
    ignored: str = r"h\.\d+\.attn\.(bias|masked_bias)"

    def place(self, ours: str, experts: int = 1) -> tuple[list[str], Row]:
        """我们的张量在对方那里的全名（不含前缀）与存法；叠起来的逐个专家列出。"""
        if self.rows is None:
            return [ours], Row((ours,))
        stem, _, kind = ours.rpartition(".")
        layer = _LAYER.fullmatch(stem)
        row = self.rows[f"h.{{i}}.{layer[2]}" if layer else stem]
        names = [name.replace("{i}", layer[1] if layer else "") for name in row.theirs]
        if row.stacked:
            names = [name.replace("{e}", str(e)) for e in range(experts) for name in names]
        return [f"{name}.{kind}" for name in names], row


_BLOCK = {
    f"h.{{i}}.{name}": f"h.{{i}}.{name}"
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
}
_GPT2 = {"embed.wte": "wte", "embed.wpe": "wpe", **_BLOCK, "ln_f": "ln_f"}

GPT2 = Layout(("transformer.", ""), _rows(_GPT2, conv1d=True))
# nanoGPT 用 nn.Linear，不转置。
NANOGPT = Layout(("transformer.", ""), _rows(_GPT2))
OPENAI_GPT = Layout(
    ("transformer.", ""),
    _rows({"embed.wte": "tokens_embed", "embed.wpe": "positions_embed", **_BLOCK}, conv1d=True),
)
_IN_LAYER = "layers.{i}."
_QKV = tuple(f"{_IN_LAYER}self_attn.{p}_proj" for p in "qkv")
OPT = Layout(
    ("model.decoder.", "decoder."),
    {
        **_rows(
            {
                "embed.wte": "embed_tokens",
                "h.{i}.ln_1": _IN_LAYER + "self_attn_layer_norm",
                "h.{i}.attn.c_proj": _IN_LAYER + "self_attn.out_proj",
                "h.{i}.ln_2": _IN_LAYER + "final_layer_norm",
                "h.{i}.mlp.c_fc": _IN_LAYER + "fc1",
                "h.{i}.mlp.c_proj": _IN_LAYER + "fc2",
                "ln_f": "final_layer_norm",
            }
        ),
        "embed.wpe": Row(("embed_positions",), skip=2),
        "h.{i}.attn.c_attn": Row(_QKV),
    },
)

_EXPERT = "layers.{i}.block_sparse_moe.experts.{e}."
# 文件里每个专家的 w1（门）、w3、w2 各自存放；transformers 在内存里才叠起来。
MIXTRAL = Layout(
    ("model.",),
    {
        **_rows(
            {
                "embed.wte": "embed_tokens",
                "h.{i}.ln_1": _IN_LAYER + "input_layernorm",
                "h.{i}.attn.c_proj": _IN_LAYER + "self_attn.o_proj",
                "h.{i}.ln_2": _IN_LAYER + "post_attention_layernorm",
                "h.{i}.mlp.router": _IN_LAYER + "block_sparse_moe.gate",
                "ln_f": "norm",
            }
        ),
        "h.{i}.attn.c_attn": Row(_QKV),
        "h.{i}.mlp.experts.c_fc": Row((_EXPERT + "w1", _EXPERT + "w3")),
        "h.{i}.mlp.experts.c_proj": Row((_EXPERT + "w2",)),
    },
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


# 我们自带代码的 transformers 模型：主干外面只多一层 "model."。
OWN = Layout(("model.",), None)


def read_tensors(
    layout: Layout,
    config: GPT2Config,
    expected: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    extra_vocab: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """逐个给出 (我们的名字, 张量)；expected 是配置推出的名字与形状，在读任何张量之前核对。

    输出头不在 expected 里（共享）而文件里有，必须与词嵌入相等。
    extra_vocab: 词表在文件里多出的行数，读了就去掉。

    Raises:
        ValueError: 缺、多、形状不符，或说是共享的头其实不同。
    """
    prefix = find_prefix(layout, source)
    wanted: dict[str, tuple[int, ...]] = {}
    for ours, shape in expected.items():
        names, row = _full(layout, prefix, ours, shape)
        extra = extra_vocab if ours in _VOCAB else 0
        one = shape[1:] if row.stacked else shape
        each = row.rows(ours, one[0], config) * (len(names) // len(row.theirs))
        for name, rows in zip(names, each, strict=True):
            size = (rows + row.skip + extra, *one[1:])
            wanted[name] = size[::-1] if _turned(row, shape) else size
    _check_names(layout, prefix, wanted, source, tied=HEAD not in expected)
    for ours, shape in expected.items():
        names, row = _full(layout, prefix, ours, shape)
        parts = [source.read(name) for name in names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if row.stacked:
            tensor = tensor.view(shape)
        if _turned(row, shape):
            tensor = tensor.T.contiguous()
        if ours == "embed.wte.weight" and HEAD not in expected:
            _check_tied(tensor, prefix, source)
        first, end = row.skip, row.skip + shape[0]
        # 切片要复制：否则多出的行跟着整个张量留在内存里。
        yield ours, tensor if end == len(tensor) and not first else tensor[first:end].clone()


def write_tensors(
    layout: Layout, config: GPT2Config, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """我们的 state_dict 换成对方的名字与存法；read_tensors 的逆。"""
    result = {}
    for ours, tensor in state.items():
        names, row = _full(layout, layout.prefixes[0], ours, tensor.shape)
        if _turned(row, tensor.shape):
            tensor = tensor.T
        if row.skip:
            tensor = torch.cat([tensor.new_zeros(row.skip, *tensor.shape[1:]), tensor])
        each = tensor if row.stacked else (tensor,)
        parts = [part for one in each for part in one.split(row.rows(ours, one.shape[0], config))]
        result.update({n: p.contiguous() for n, p in zip(names, parts, strict=True)})
    return result


def _turned(row: Row, shape: tuple[int, ...] | torch.Size) -> bool:
    return row.transpose and len(shape) == 2


def _full(layout: Layout, prefix: str, ours: str, shape: tuple[int, ...]) -> tuple[list[str], Row]:
    if ours == HEAD:
        return [_head(prefix)], Row((HEAD,))
    names, row = layout.place(ours, shape[0])
    return [prefix + name for name in names], row


def _head(prefix: str) -> str:
    """输出头在主干之外，只跟着外面套着的那一段。"""
    return _wrappers(prefix) + HEAD


def _wrappers(name: str) -> str:
    found = _WRAPPED.match(name)
    return found[0] if found else ""


def find_prefix(layout: Layout, source: TensorSource) -> str:
    """主干的名字之前有什么，连同 DDP 与 torch.compile 套上的。

    Raises:
        ValueError: 没有词嵌入。
    """
    (name,), _ = layout.place("embed.wte.weight")
    starts = {_wrappers(found) for found in source.shapes}
    for prefix in layout.prefixes:
        for start in sorted(starts):
            if start + prefix + name in source.shapes:
                return start + prefix
    looked = ", ".join(repr(prefix + name) for prefix in layout.prefixes)
    raise ValueError(
        f"{source.where}: no token embedding there (looked for {looked}); the file has "
        f"{len(source.shapes)} tensors such as {sorted(source.shapes)[:3]}"
    )


def _check_names(
    layout: Layout,
    prefix: str,
    wanted: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    tied: bool,
) -> None:
    missing = sorted(wanted.keys() - source.shapes.keys())
    allowed = re.compile(re.escape(prefix) + f"(?:{layout.ignored})")
    head = _head(prefix)
    extra = sorted(
        name
        for name in source.shapes.keys() - wanted.keys()
        if not allowed.fullmatch(name) and not (tied and name == head)
    )
    if missing or extra:
        raise ValueError(
            f"{source.where} does not fit its config: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(extra)} unknown {extra[:3]}: the weights belong to another "
            "configuration"
        )
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise ValueError(
                f"{source.where}: {name} has shape {source.shapes[name]} but the config says "
                f"{shape}: the weights belong to another configuration"
            )


def _check_tied(embedding: Tensor, prefix: str, source: TensorSource) -> None:
    name = _head(prefix)
    if name in source.shapes and not torch.equal(source.read(name), embedding):
        raise ValueError(
            f"{source.where}: {name} differs from the token embedding, but the config says they "
            "are tied: set tie_word_embeddings to false in config.json"
        )

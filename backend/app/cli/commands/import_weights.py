"""`gpt2 import`：别处的权重变成我们的模型文件夹，连同分词器。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from typing_extensions import Doc

from app.models.transformer.config import Activation, Norm

SUMMARY = "turn weights from Hugging Face or nanoGPT into a model folder"
EXAMPLES = """\
  gpt2 import openai-community/gpt2 --out models/gpt2
  gpt2 import ./gpt2-xl --out models/xl --dtype float16
  gpt2 import nanoGPT/out/ckpt.pt --allow-pickle --tokenizer models/gpt2 --out models/nano

GPT-2 becomes norm="pre", GPT-1 (openai-gpt) norm="post", OPT either, as its config says. A name
is looked up on the hub, without a network in its cache. Only safetensors are read unless you say
otherwise."""


@dataclass(frozen=True)
class Args:
    """`gpt2 import` 的选项。"""

    source: Annotated[
        tyro.conf.Positional[str],
        Doc(
            "Hugging Face folder or hub id (gpt2, openai-gpt, opt, mixtral), one .safetensors file "
            "with its config.json beside it, or nanoGPT's ckpt.pt"
        ),
    ]
    out: Annotated[Path, Doc("folder to write; must be new or empty")]
    norm: Annotated[Norm | None, Doc("refuse weights of another norm; None = what they are")] = None
    activation: Annotated[
        Activation | None,
        Doc(
            "as --norm; a file of tensors alone (nanoGPT's too) does not say, so it is set by this"
        ),
    ] = None
    n_head: Annotated[
        int | None, Doc("as --norm; a file of tensors alone does not say, so it is set by this")
    ] = None
    tokenizer: Annotated[
        Path | None,
        Doc("folder with another tokenizer (of Hugging Face or ours), or nanoGPT's meta.pkl"),
    ] = None
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Doc("precision to keep; None = the file's"),
    ] = None
    allow_pickle: Annotated[
        bool, Doc("read pytorch_model.bin, ckpt.pt, meta.pkl: weights_only, size limits")
    ] = False


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 找不到、读不懂、不安全，与 --norm 不符，或 --out 已有东西。
    """
    import torch

    from app.common.files import check_free
    from app.interop.reading.importing import import_model, write_model

    check_free(args.out)
    asked = {name: getattr(args, name) for name in ("norm", "activation", "n_head")}
    found = import_model(
        args.source,
        allow_pickle=args.allow_pickle,
        tokenizer=args.tokenizer,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        wanted={name: value for name, value in asked.items() if value is not None},
    )
    write_model(found, args.out)
    config = found.model.config
    print(
        f"model      norm {config.norm}, {config.n_layer} layers, {config.n_head} heads, width "
        f"{config.n_embed}, context {config.context_size}, vocabulary {config.vocab_size:,}, "
        f"{config.activation}, {found.model.num_parameters():,} parameters"
    )
    if found.tokenizer is None:
        print(f"tokenizer  none ({found.why}): `gpt2 generate` needs one; use token ids in Python")
    else:
        print(f"tokenizer  {found.tokenizer.kind}, {found.tokenizer.vocab_size:,} ids")
    for note in found.notes:
        print(f"note       {note}")
    print(f"written    {args.out}")

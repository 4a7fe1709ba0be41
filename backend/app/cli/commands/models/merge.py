"""`gpt2 merge`：适配器与它的原模型相加，写成一个普通的模型文件夹。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from typing_extensions import Doc

from app.cli.shared.trained import load_model, write_trained
from app.common.files import check_free

SUMMARY = "add an adapter to its base: one model folder, with nothing left to look up"
EXAMPLES = """\
  gpt2 merge runs/answers --out models/answers
  gpt2 merge runs/answers/best --out models/answers --dtype bfloat16
  gpt2 merge adapter-of-peft --base models/gpt2 --out models/answers"""


@dataclass(frozen=True)
class Args:
    """和在 float32 里算，之后才换精度。"""

    model: Annotated[
        tyro.conf.Positional[str],
        Doc("run of tune.trainable=lora, RUN/best, a checkpoint, or an adapter folder of PEFT"),
    ]
    out: Annotated[Path, Doc("folder to write the model to; must not exist")]
    base: Annotated[
        Path | None, Doc("model it was trained on; None = where it was during training")
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Doc("None = the base's own")
    ] = None


def run(args: Args) -> None:
    """
    Raises:
        ValueError: 那里没有适配器，原模型不在或不是那个，没有分词器，或 --out 已存在。
    """
    import torch

    from app.adapters.files import is_adapter
    from app.data.chat.template import find_template

    check_free(args.out)
    model, tokenizer, folder = load_model(args.model, "cpu", args.base)
    if not is_adapter(folder):
        raise ValueError(f"{folder} holds a whole model and no adapter: there is nothing to merge")
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer and --base {args.base} has none either")
    if args.dtype is not None:
        model = model.to(getattr(torch, args.dtype))
    template = find_template(folder)
    if template is None and args.base is not None:
        template = find_template(args.base)
    write_trained(model.config, model.state_dict(), tokenizer, args.out, template)
    print(
        f"{args.out}: {model.num_parameters():,} parameters in "
        f"{str(next(model.parameters()).dtype).removeprefix('torch.')}, the adapter of {folder} "
        f'added to its base\nwrite with it:\n  gpt2 generate {args.out} --prompt "..."'
    )

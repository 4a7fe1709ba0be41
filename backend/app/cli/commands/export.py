"""`gpt2 export`：训练好的模型写成别的运行时的格式，写完用那个运行时算一遍。"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typing_extensions import Doc

from app.cli.shared.trained import TrainedName, load_model
from app.interop.targets import Target

SUMMARY = "write a trained model for transformers, llama.cpp, ONNX or CTranslate2"
EXAMPLES = """\
  gpt2 export runs/mine --to hf --out exported/hf
  gpt2 export runs/mine/best --to gguf --quantize q8_0 --out exported/gguf
  gpt2 export runs/mine --to onnx --out exported/onnx
  ct2-transformers-converter --model exported/hf --output_dir exported/ct2

hf: norm="pre" becomes GPT2LMHeadModel, "post" and "deepnorm" OPTForCausalLM. Afterwards the target
library, where it is installed, computes the same tokens and the largest difference is printed."""


@dataclass(frozen=True)
class Args:
    """`gpt2 export` 的选项。"""

    model: TrainedName
    to: Annotated[Target, Doc("format; a model that has no place in it is refused with the reason")]
    out: Annotated[Path, Doc("folder to write; must be new or empty")]
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Doc("precision of the weights; None = the model's"),
    ] = None
    quantize: Annotated[Literal["q8_0"] | None, Doc("8-bit matrices (gguf only)")] = None
    data: Annotated[
        Path | None,
        Doc("prepared conversations, the first 50 check the chat template; None = made-up ones"),
    ] = None


def run(args: Args) -> int:
    """写完由目标的运行时算一遍；算出的不是同一个函数，退出码就是 1。

    Raises:
        ValueError: 不是模型，去不了这种格式，或 --out 已有东西。
    """
    from app.data.chat.convert import first_conversations
    from app.data.chat.template import find_template
    from app.interop.chat import Chat
    from app.interop.export import export

    model, tokenizer, folder = load_model(args.model, "cpu")
    template = find_template(folder)
    if args.data is not None and template is None:
        raise ValueError(
            f"--data {args.data} checks a chat template, but {folder} has none: leave it out"
        )
    rows = [] if args.data is None else first_conversations(args.data)
    chat = None if template is None else Chat(template, rows)
    done = export(
        model, tokenizer, args.to, args.out, dtype=args.dtype, quantize=args.quantize, chat=chat
    )
    print(f"written  {done.written} ({done.kind})")
    for note in done.notes:
        print(f"note     {note}")
    if tokenizer is None:
        print(f"note     {folder} has no tokenizer, so none was written")
    print(f"checked  {done.checked}")
    if not isinstance(done.checked, str) and not done.checked.same:
        print(f"error: {args.to} computes another function: do not use {args.out}", file=sys.stderr)
        return 1
    return 0

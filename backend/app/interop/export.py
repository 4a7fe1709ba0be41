"""一个入口：模型与分词器写成目标格式，再用目标的运行时算一遍。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from app.common.files import check_free
from app.data.tokenizers import Tokenizer
from app.interop.chat import GENERATION_FILE, Chat, add_chat
from app.interop.compare import Exported
from app.interop.job import DType, Job, Quantize
from app.interop.targets import TARGETS, Target, check_target
from app.models.transformer import GPT2Model
from app.quantization.model import QuantizedModel, dequantize

_FLOATS = (
    "the model is quantized and this format has no place for its codes: float copies of the "
    "quantized values were written"
)


def export(
    model: GPT2Model,
    tokenizer: Tokenizer | None,
    target: Target,
    folder: Path,
    *,
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    chat: Chat | None = None,
) -> Exported:
    """
    Args:
        dtype: 写出的精度；None = 模型现有的。
        quantize: 只给认得它的格式（见 targets）。
        chat: 对话模板，写进 transformers 的文件夹（并与它比）或 GGUF；别的格式没有地方放。

    Raises:
        ValueError: 没有这种格式，这种配置去不了，folder 已有东西，或选项与目标不合。
        ImportError: 目标要的库没有装；点名 extra。
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {', '.join(TARGETS)}")
    if quantize is not None and quantize not in TARGETS[target].quantize:
        takers = [f"--to {name}" for name, row in TARGETS.items() if quantize in row.quantize]
        raise ValueError(
            f"quantize={quantize!r} is for {', '.join(takers)} only, not --to {target}"
        )
    if quantize is not None and dtype is not None:
        raise ValueError(
            f"quantize={quantize!r} and dtype={dtype!r} both say how the matrices are stored"
        )
    check_target(target, model.config)
    check_free(folder)
    if isinstance(model, QuantizedModel) and not TARGETS[target].codes:
        done = export(dequantize(model), tokenizer, target, folder, dtype=dtype, chat=chat)
        return replace(done, notes=(_FLOATS, *done.notes))
    wanted = None if dtype is None else getattr(torch, dtype)
    template = None if chat is None else chat.template
    job = Job(model.eval().cpu(), tokenizer, folder, wanted, quantize, template)
    done = TARGETS[target].write(job)
    if chat is None or tokenizer is None or TARGETS[target].chats:
        return done
    if not (folder / GENERATION_FILE).is_file():
        note = f"--to {target} has no place for the chat template: write each turn as it says"
        return replace(done, notes=(*done.notes, f"{note} ({chat.template.name})"))
    return replace(done, notes=(*done.notes, add_chat(folder, chat, tokenizer)))

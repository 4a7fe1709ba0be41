"""一个入口：模型与分词器写成目标格式，再用目标的运行时算一遍。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from app.data.tokenizers import Tokenizer
from app.interop.compare import Exported
from app.interop.equivalent import Weights
from app.interop.hf import check_free, compare_hf, write_hf
from app.interop.own_code import write_own_code
from app.interop.targets import Target, check_target, family_name
from app.models.transformer import GPT2Model
from app.quantization.model import QuantizedModel, dequantize

_FLOATS = (
    "the model is quantized and this format has no place for its codes: float copies of the "
    "quantized values were written"
)
DType = Literal["float32", "float16", "bfloat16"]


def export(
    model: GPT2Model,
    tokenizer: Tokenizer | None,
    target: Target,
    folder: Path,
    *,
    dtype: DType | None = None,
    quantize: Literal["q8_0"] | None = None,
) -> Exported:
    """
    Args:
        dtype: 写出的精度；None = 模型现有的。
        quantize: 只给 gguf。

    Raises:
        ValueError: 这种配置去不了，folder 已有东西，或选项与目标不合。
        ImportError: 目标要的库没有装；点名 extra。
    """
    if quantize is not None and target != "gguf":
        raise ValueError(f"quantize={quantize!r} is for --to gguf only, not --to {target}")
    check_target(target, model.config)
    check_free(folder)
    model = model.eval().cpu()
    if isinstance(model, QuantizedModel) and target != "gguf":
        done = export(dequantize(model), tokenizer, target, folder, dtype=dtype)
        return replace(done, notes=(_FLOATS, *done.notes))
    wanted = None if dtype is None else getattr(torch, dtype)
    if target == "gguf":
        from app.interop.gguf_file import export_gguf

        return export_gguf(model, tokenizer, folder, wanted, quantize)
    weights = Weights.of(model)
    if target == "onnx":
        from app.interop.onnx_graph import export_onnx

        return export_onnx(model, weights.to(wanted), tokenizer, folder)
    family = family_name(model.config) if target == "hf" else target
    if family is None:
        # 没有现成的模型认得这种配置。
        written = write_own_code(weights, tokenizer, folder, wanted)
        checked = compare_hf(model, folder, own_code=True)
        return Exported(folder, "own code", written.notes, checked)
    written = write_hf(weights, family, tokenizer, folder, wanted)
    return Exported(folder, family, written.notes, compare_hf(model, folder))

"""一次导出要写的东西：登记表里每个格式的函数都收它。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from app.data.chat.template import Template
from app.data.tokenizers import Tokenizer
from app.models.transformer import GPT2Model

DType = Literal["float32", "float16", "bfloat16"]
Quantize = Literal["q8_0"]


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        model: 在 CPU 上，eval。
        folder: 要写的文件夹，新的或空的。
        dtype: 写出的精度；None = 模型现有的。
        quantize: 只给登记了它的格式。
        template: 对话模板；格式有地方放就写上。
    """

    model: GPT2Model
    tokenizer: Tokenizer | None
    folder: Path
    dtype: torch.dtype | None = None
    quantize: Quantize | None = None
    template: Template | None = None

"""没有现成的模型认得的配置：连模型的源文件一起写，transformers 用 trust_remote_code=True 打开。"""

from __future__ import annotations

from pathlib import Path

import torch

from app.common.files import write_folder
from app.data.tokenizers import Tokenizer
from app.interop import tokens
from app.interop.equivalent import Weights, widened
from app.interop.hf import generation_settings, special_keys, to_json
from app.models.transformer import GPT2Model
from app.models.transformer.weights.families import VOCAB_KEY
from app.models.transformer.weights.own_folder import assemble


def write_own_code(
    weights: Weights, tokenizer: Tokenizer | None, folder: Path, dtype: torch.dtype | None
) -> Weights:
    """
    Returns:
        写出的（补过词表的）权重与说明。
    Raises:
        ValueError: folder 已有东西。
        ImportError: 没有装 transformers；点名 extra。
    """
    from app.interop.transformers import save, wrap

    trained = weights.config.vocab_size
    if tokenizer is not None:
        pad = tokens.special_ids(tokenizer).pad
        weights = widened(weights, max(trained, pad + 1))
    weights = weights.to(dtype)
    model = assemble(
        GPT2Model, weights.config, weights.state.items(), torch.device("cpu"), dtype=None
    )
    wrapped = wrap(model, **special_keys(tokenizer))
    if weights.config.vocab_size != trained:
        setattr(wrapped.config, VOCAB_KEY, trained)
    files = {}
    if tokenizer is not None:
        raw = special_keys(tokenizer) | {"vocab_size": weights.config.vocab_size}
        size = weights.config.vocab_size
        files = tokens.tokenizer_files(tokenizer, weights.config.context_size, size)
        files["generation_config.json"] = to_json(generation_settings(raw, tokenizer))

    def fill(new: Path) -> None:
        save(wrapped, new)
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")

    write_folder(folder, fill)
    return weights

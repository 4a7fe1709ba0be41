"""上下文缩短：学得的位置嵌入只留前面的行；从不加长，多出的行没有人训练过。"""

from __future__ import annotations

import dataclasses

from torch import nn

from app.models.transformer import GPT2Config, GPT2Model


def shrunk(config: GPT2Config, size: int, where: str) -> GPT2Config:
    """
    Raises:
        ValueError: size 比 config 的长。
    """
    before = config.context_size
    if size > before:
        raise ValueError(
            f"model.context_size={size} but {where} has {before}: a context may shrink, never "
            f"grow; use model.context_size={before} or less"
        )
    rope = config.rope
    if rope.scaling == "yarn" and rope.original_context is None:
        # 没写时就取 context_size：跟着缩短会悄悄换掉每个频率。
        rope = dataclasses.replace(rope, original_context=before)
    return config if size == before else config.replace(context_size=size, rope=rope)


def fit_context(model: GPT2Model, size: int, where: str) -> None:
    """就地。

    Raises:
        ValueError: size 比模型的长。
    """
    model.config = shrunk(model.config, size, where)
    model.patterns = model.config.patterns
    table = model.embed.wpe
    if table is not None and size < table.num_embeddings:
        table.weight = nn.Parameter(table.weight.detach()[:size].clone())
        table.num_embeddings = size

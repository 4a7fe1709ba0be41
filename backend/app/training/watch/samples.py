"""训练途中的样文：自带种子，不编译，不动训练的随机数。"""

from __future__ import annotations

import torch

from app.data.tokenizers import Tokenizer
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model

from ..config import TrainConfig
from ..machine.runtime import Runtime

_SAMPLING = SamplingConfig(temperature=0.8, top_k=200)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """
    Raises:
        ValueError: 分词器不认识提示里的字符；开训之前就该知道。
    """
    return tokenizer.encode_prompt(prompt or "\n")


def sample_text(
    model: GPT2Model, tokenizer: Tokenizer, config: TrainConfig, runtime: Runtime
) -> str:
    """接着 sample_prompt 写 sample_tokens 个词元，连同提示返回。"""
    prompt = encode_prompt(tokenizer, config.sample_prompt)[-config.model.context_size :]
    # 生成的形状一步一变，编译只会反复重来。
    with torch.compiler.set_stance("force_eager"), runtime.autocast():
        options = Options(
            max_new_tokens=config.sample_tokens,
            sampling=_SAMPLING,
            stop_ids=tuple(tokenizer.stop_ids),
            overflow="slide",
        )
        done = complete(model, [prompt], options, tokenizer=tokenizer, seeds=[config.seed])
    return tokenizer.decode([*prompt, *done[0].tokens])

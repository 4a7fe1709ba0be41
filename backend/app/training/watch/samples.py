"""训练途中的样文：自带种子，不编译，不动训练的随机数。"""

from __future__ import annotations

import torch

from app.data.tokenizers import Tokenizer
from app.generation.config import Options, SamplingConfig
from app.generation.generate import complete
from app.models.transformer import GPT2Model

from ..config import TrainConfig
from ..machine.runtime import Runtime
from ..saving.checkpoint import Tell

SAMPLING = SamplingConfig(temperature=0.8, top_k=200)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """空的提示是一个换行；字符表里没有换行的（DNA、名单），就从文档的开头写起。

    Raises:
        ValueError: 分词器不认识提示里的字符；开训之前就该知道。
    """
    try:
        return tokenizer.encode_prompt(prompt or "\n")
    except ValueError as error:
        if not prompt:
            return tokenizer.encode_prompt("")
        raise ValueError(
            f"sample_prompt={prompt!r} cannot be encoded: {error}; use another --sample-prompt "
            "(empty fits all data), or --sample-tokens 0 for no samples"
        ) from None


def check_prompt(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """
    Raises:
        ValueError: 要写样文，而分词器不认识提示里的字符。
    """
    if config.sample_tokens:
        encode_prompt(tokenizer, config.sample_prompt)


def usable_prompt(
    config: TrainConfig, preset: TrainConfig | None, tokenizer: Tokenizer, tell: Tell
) -> TrainConfig:
    """运行文件自带的提示（不是用户此刻要的）写不进这份数据，就换成默认的，说一句。

    Raises:
        ValueError: 用户自己给的提示里有分词器不认识的字符。
    """
    try:
        check_prompt(config, tokenizer)
    except ValueError:
        if preset is None or preset.sample_prompt != config.sample_prompt:
            raise
        tell(
            f"note: sample_prompt={config.sample_prompt!r} of the run file cannot be encoded with "
            "this data: samples begin with a line break or a new document instead"
        )
        return config.replace(sample_prompt="")
    return config


def sample_text(
    model: GPT2Model, tokenizer: Tokenizer, config: TrainConfig, runtime: Runtime
) -> str:
    """接着 sample_prompt 写 sample_tokens 个词元，连同提示返回。"""
    prompt = encode_prompt(tokenizer, config.sample_prompt)[-config.model.context_size :]
    # 生成的形状一步一变，编译只会反复重来。
    with torch.compiler.set_stance("force_eager"), runtime.autocast():
        options = Options(
            max_new_tokens=config.sample_tokens,
            sampling=SAMPLING,
            stop_ids=tuple(tokenizer.stop_ids),
            overflow="slide",
        )
        done = complete(model, [prompt], options, tokenizer=tokenizer, seeds=[config.seed])
    return tokenizer.decode([*prompt, *done[0].tokens])
